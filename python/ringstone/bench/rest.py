"""What a volume costs at rest: memory, the time to attach it, and the CPU of a gateway with nothing to do."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from ringstone.bench.gateway import EngineProcess
from ringstone.bench.process import cpu_share, held_job, resident_bytes
from ringstone.bench.reports import HoldReport
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.spread import Bar, Spread
from ringstone.errors import RingstoneError

VOLUMES = 16
VOLUME_BYTES = 64 << 20


class Held:
    """Idle connections; `report` is there once they are closed."""

    report: HoldReport | None = None


@contextmanager
def connected(sockets: Sequence[Path]) -> Iterator[Held]:
    """Hold a connection to each socket with one idle queue; returns from entering when all are set up."""
    held = Held()
    with held_job({"mode": "hold", "sockets": [str(socket) for socket in sockets]}) as job:
        yield held
    held.report = HoldReport.model_validate(job.answer)


def at_rest(setting: Setting, results: Results) -> None:
    """Attach one volume, then sixteen more, to an engine of its own, connect to all, and leave them alone."""
    section = f"at rest, {VOLUMES} attached volumes with an idle frontend each"
    plan, directory = setting.plan, setting.directory / "rest"
    directory.mkdir()
    with ExitStack() as stack:
        engine = stack.enter_context(EngineProcess(directory, [setting.cores.server]))
        names = [f"idle{index}" for index in range(VOLUMES + 1)]
        # The first one pays for what all share; it is not counted.
        attach_idle(engine, names[0], directory)
        stack.enter_context(connected([engine.socket_of(names[0])]))
        before = resident_bytes(engine.pid)
        attach_ns = [attach_idle(engine, name, directory) for name in names[1:]]
        with connected([engine.socket_of(name) for name in names[1:]]) as held:
            grown = (resident_bytes(engine.pid) - before) / VOLUMES
            idle = [cpu_share(engine.pid, plan.window.seconds) for _ in range(plan.rounds)]
            states = {attachment["state"] for attachment in engine.call("attachments")}
        if states != {"running"}:
            raise RingstoneError(
                f"Idle volumes were {', '.join(sorted(states))}, not running. See the engine's log."
            )
    connect_ns = cast(HoldReport, held.report).connect_ns
    total_ms = [(attach + connect) / 1e6 for attach, connect in zip(attach_ns, connect_ns, strict=True)]
    results.rows += [
        Row.absolute(
            section,
            "memory for each volume, with its rings",
            "KiB",
            Spread.of([grown / 1024]),
            Bar("at most 2048 KiB beyond the rings", at_most=2048.0),
            "resident memory of the process, from 1 to 17 connected file volumes",
        ),
        Row.absolute(
            section,
            "attach: from the call until a frontend's queue runs",
            "ms",
            Spread.of(total_ms),
            Bar("at most 50 ms", at_most=50.0),
            f"the call alone {max(attach_ns) / 1e6:.2f} ms, the frontend's set-up "
            f"{max(connect_ns) / 1e6:.2f} ms at most",
        ),
        Row.absolute(
            section,
            "CPU of an idle gateway",
            "% of a core",
            Spread.of([share * 100 for share in idle]),
            Bar("at most 1 % of a core", at_most=1.0),
            f"CPU time of the whole process in {plan.rounds} windows of {plan.window.seconds:g} s",
        ),
    ]


def attach_idle(engine: EngineProcess, name: str, directory: Path) -> int:
    """Serve a sparse file; nanoseconds that the attach call took."""
    file = directory / name
    with file.open("xb") as empty:
        empty.truncate(VOLUME_BYTES)
    engine.call("open", name=name, backend=json.dumps({"type": "file", "path": str(file)}), size=VOLUME_BYTES)
    return engine.timed_call("attach", name=name, socket_path=str(engine.socket_of(name)))[1]
