"""An engine in a process of its own: `python -m ringstone.bench.server`. It reads lines of JSON, the first
with the engine's arguments, each other one a call ({"do": "attach", ...}), answers each with a line, and
stops with its input."""

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ringstone import _engine


def _calls(engine: _engine.Engine) -> dict[str, Callable[..., Any]]:
    def open_volume(key: str | None = None, **given: Any) -> None:
        engine.open_volume(key=None if key is None else bytes.fromhex(key), **given)

    return {
        "open": open_volume,
        "close": engine.close_volume,
        "attach": engine.attach,
        "detach": engine.detach,
        "volumes": engine.volumes,
        "attachments": engine.attachments,
        "events": engine.drain_events,
        "move_queue": engine.move_queue,
        **_store_calls(),
    }


def _store_calls() -> dict[str, Callable[..., Any]]:
    """Of stores by their path. A command is a dictionary, as `_engine.Store.call` describes it."""
    stores: dict[str, _engine.Store] = {}

    def open_store(path: str) -> None:
        stores[path] = _engine.Store(path)

    def close_store(path: str) -> None:
        stores.pop(path).close()

    def command(path: str, command: dict[str, Any]) -> Any:
        return json.loads(stores[path].call(json.dumps(command)))

    def create_encrypted(path: str, key: str, **given: Any) -> None:
        stores[path].create_encrypted(key=bytes.fromhex(key), **given)

    return {
        "create_encrypted": create_encrypted,
        "format_store": _engine.Store.format,
        "open_store": open_store,
        "close_store": close_store,
        "command": command,
    }


def main() -> None:
    # Ctrl-C goes to the whole foreground group; this process ends when its parent closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arguments = json.loads(sys.stdin.readline())
    engine = _engine.Engine(
        arguments["cores"],
        idle_us=arguments["idle_us"],
        stats_path=arguments["stats_path"],
        balance=arguments["balance"],
    )
    try:
        calls = _calls(engine)
        _answer({"result": None, "took_ns": 0})
        for line in sys.stdin:
            request = json.loads(line)
            call = calls[request.pop("do")]
            began = time.perf_counter_ns()
            try:
                answer = {"result": call(**request)}
            except _engine.EngineError as error:
                answer = {"code": error.code, "error": str(error)}
            _answer(answer | {"took_ns": time.perf_counter_ns() - began})
    finally:
        engine.stop()


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
