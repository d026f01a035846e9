"""The independent client in one process for many scripts, for tests that make so many that starting it each time is
what takes long; and content that a test chooses, since Python cannot tell the client's own.

`python -m tests.framework.scripts` takes a job on each line of its standard input and answers each with a line.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

from ringstone import _engine
from ringstone.bench.process import LineProcess

SECTOR = 512
_OUT, _IN = 1, 0


class Scripts:
    """The process, while the `with` block runs. `log` takes its standard error."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __enter__(self) -> Self:
        self._process = LineProcess([sys.executable, "-m", "tests.framework.scripts"], log=self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.close()

    def results(self, socket: str, operations: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        """Of each request, whatever it is. `more`: further fields of the job."""
        return self.start(socket, operations, **more)()

    def start(
        self, socket: str, operations: list[dict[str, Any]], **more: Any
    ) -> Callable[[], list[dict[str, Any]]]:
        """What waits for the results of requests that are under way."""
        self._process.send({"mode": "script", "socket": socket, "operations": operations, **more})

        def results() -> list[dict[str, Any]]:
            answer = self._process.receive()
            assert "error" not in answer, answer["error"]
            results: list[dict[str, Any]] = answer["results"]
            return results

        return results

    def run(self, socket: str, operations: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
        """As results(), and all must succeed."""
        results = self.results(socket, operations, **more)
        assert len(results) == len(operations), results
        assert all(one["status"] == "ok" for one in results), [one["status"] for one in results]
        return results


def content(seed: int, length: int) -> bytes:
    """The same for the same seed and length, and nowhere zero for long."""
    return Random(seed).randbytes(length)


def write(offset: int, data: bytes) -> dict[str, Any]:
    """A request that writes `data`."""
    return {"op": "raw", "type": _OUT, "sector": offset // SECTOR, "readable": [data.hex()]}


def read(offset: int, length: int) -> dict[str, Any]:
    """A request whose result's `text` has what is there, as hexadecimal digits."""
    return {"op": "raw", "type": _IN, "sector": offset // SECTOR, "writable": [length]}


def main() -> None:
    for line in sys.stdin:
        try:
            answer = _engine.load(line)
        except _engine.EngineError as error:
            answer = json.dumps({"code": error.code, "error": str(error)})
        print(answer.replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
