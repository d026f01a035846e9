"""How long guests' requests pause when the gateway crashes, is upgraded, or moves a queue between reactors.

The clients check every answer meanwhile (`mode: pattern`), and wait for their calls as a guest does. Their rate is
limited, so that a pause is the gateway's and not that of a client without a core.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from ringstone.bench.daemon import GatewayDaemon, Start, Upgraded
from ringstone.bench.gateway import EngineProcess
from ringstone.bench.pattern import RunningPattern, running_pattern, sound
from ringstone.bench.reports import PatternReport
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Cores
from ringstone.bench.spread import Bar
from ringstone.errors import RingstoneError

QUEUES = 4
DEPTH = 32
RECONNECT_MS = 20
MOVES_A_SECOND = 20
_MOVE_SECONDS = 10.0
_LOOK_SECONDS = 0.002
VOLUME_BYTES = 64 << 20
SPAN_BYTES = 16 << 20

T = TypeVar("T")

# Requests a second over all clients: far below what one client can check, and what the drive gives.
RATE = {"memory": 20_000, "file": 6_000}


def _job(cores: Cores, rate: float) -> dict[str, Any]:
    # No flushes: how long one takes is the drive's affair and not a pause.
    return {
        "queues": QUEUES,
        "depth": DEPTH,
        "rate": rate,
        "flush_share": 0,
        "reconnect_ms": RECONNECT_MS,
        "span_bytes": SPAN_BYTES,
        "cores": [cores.client],
    }


# Kinds and numbers of volumes that are upgraded.
UPGRADES = (("memory", 1), ("memory", 8), ("file", 1), ("file", 8))


# A crash.


@dataclass(frozen=True, slots=True)
class CrashPause:
    """One crash as the client saw it. `gap_ns`: the longest time without a completion. The rest are the parts of
    it that follow the kill: until the new process listens, until the client is connected to it, and until the first
    completion. `start` is that of the new process."""

    gap_ns: int
    listening_ns: int
    reconnect_ns: int
    first_ns: int
    start: Start


def crash_pause(report: PatternReport, killed_ns: int, start: Start) -> CrashPause:
    """Lays the client's report beside what this process saw, both CLOCK_MONOTONIC. RingstoneError when the client
    did not lose its backend exactly once."""
    if len(report.outages) != 1 or start.listening is None:
        raise RingstoneError(
            f"The client lost its backend {len(report.outages)} times instead of once. See the gateway's log."
        )
    zero = report.started_monotonic_ns
    outage = report.outages[0]
    connected = zero + outage.start_ns + outage.duration_ns
    # The gap in which the client came back; there is one, as nothing completes without a backend.
    ends = [gap.start_ns + gap.duration_ns for gap in report.gaps if zero + gap.start_ns <= connected]
    first = zero + max(ends, default=0)
    return CrashPause(
        gap_ns=report.longest_gap_ns,
        listening_ns=start.listening - killed_ns,
        reconnect_ns=max(connected - start.listening, 0),
        first_ns=max(first - connected, 0),
        start=start,
    )


def crash(setting: Setting, results: Results) -> None:
    """Kill the gateway under load and start it again at once, as a supervisor does."""
    section = "a crash under load: kill -9, and started again at once"
    pauses: list[CrashPause] = []
    quiet: list[Start] = []
    empty: list[int] = []
    with ExitStack() as stack:
        run, state = setting.directory / "crash", setting.disk / "crash"
        run.mkdir()
        daemon = stack.enter_context(GatewayDaemon(run, state, [setting.cores.server], "--no-balance"))
        daemon.start()
        daemon.make_pool("pool", "memory", setting.directory / "crash-pool")
        socket = daemon.serve("volume", "pool", size=VOLUME_BYTES, queues=QUEUES)
        for turn in range(setting.plan.rounds):
            # Stopped in between, so that the gateway does not take the rounds for a row of crashes.
            daemon.stop()
            empty.append(_empty_python_ns())
            quiet.append(daemon.start(watch=socket))
            with running_pattern(str(socket), **_job(setting.cores, RATE["memory"])) as client:
                time.sleep(setting.plan.window.seconds / 2)
                killed = daemon.kill()
                start = daemon.start(watch=socket)
                time.sleep(setting.plan.window.seconds / 2)
            pauses.append(crash_pause(sound(client.report), killed, start))
            setting.progress(
                f"crash: round {turn + 1}/{setting.plan.rounds}: {pauses[-1].gap_ns / 1e6:.0f} ms"
            )
    results.keep_raw(
        section,
        "ringstone",
        _job(setting.cores, RATE["memory"]),
        [
            {"pause": asdict(pause), "quiet_start": asdict(start), "empty_python_ns": python}
            for pause, start, python in zip(pauses, quiet, empty, strict=True)
        ],
    )
    results.rows += _crash_rows(section, pauses, quiet, empty)


def _crash_rows(
    section: str, pauses: Sequence[CrashPause], quiet: Sequence[Start], empty: Sequence[int]
) -> list[Row]:
    listening = [((start.listening or start.ready) - start.began) / 1e6 for start in quiet]
    python = ("empty python process", [took / 1e6 for took in empty])
    return [
        Row.beside(
            section,
            "longest gap of the client",
            "ms",
            [pause.gap_ns / 1e6 for pause in pauses],
            ("from exec until a gateway without load listens", listening),
            f"the client tries every {RECONNECT_MS} ms; QEMU with reconnect=1 tries once a second, so a guest may "
            "wait up to 1 s longer",
            Bar("at most twice that", at_most=2.0),
        ),
        Row.beside(
            section,
            "of it: from the kill until the new process listens",
            "ms",
            [pause.listening_ns / 1e6 for pause in pauses],
            python,
            "Python's own start, and the database",
        ),
        Row.told(
            section,
            "of it: from then until the client is connected",
            "ms",
            [pause.reconnect_ns / 1e6 for pause in pauses],
            f"up to {RECONNECT_MS} ms until the client tries again",
        ),
        Row.told(
            section,
            "of it: from then until the first completion",
            "ms",
            [pause.first_ns / 1e6 for pause in pauses],
            "what was in flight is found in the in-flight region and done again",
        ),
        Row.beside(
            section,
            "from exec until READY=1, without load",
            "ms",
            [(start.ready - start.began) / 1e6 for start in quiet],
            python,
            "the control API is imported after the volumes are served",
        ),
    ]


def _empty_python_ns() -> int:
    began = time.monotonic_ns()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic_ns() - began


# An upgrade.


def upgrade(setting: Setting, results: Results, cases: Sequence[tuple[str, int]] = UPGRADES) -> None:
    """Upgrade a gateway with so many volumes of a kind, for each of `cases`."""
    section = f"a hot upgrade under load, {QUEUES} queues for each volume"
    for kind, volumes in cases:
        _upgrade(section, kind, volumes, setting, results)


def _upgrade(section: str, kind: str, volumes: int, setting: Setting, results: Results) -> None:
    name = f"upgrade-{kind}-{volumes}"
    reports: list[Upgraded] = []
    left_alone: list[Seen] = []
    started: list[Seen] = []
    upgraded: list[Seen] = []
    with ExitStack() as stack:
        run, state = setting.directory / name, setting.disk / name
        run.mkdir()
        daemon = stack.enter_context(GatewayDaemon(run, state, [setting.cores.server], "--no-balance"))
        daemon.start()
        place = setting.directory if kind == "memory" else setting.disk
        daemon.make_pool("pool", kind, place / f"{name}-pool")
        sockets = [
            daemon.serve(f"volume{index}", "pool", size=VOLUME_BYTES, queues=QUEUES)
            for index in range(volumes)
        ]
        job = _job(setting.cores, RATE[kind] / volumes)
        for turn in range(setting.plan.rounds):
            seen, report = watched(sockets, job, partial(_upgrade_within, daemon, setting))
            upgraded.append(seen)
            reports.append(report)
            # As long as the one with the upgrade.
            seconds = setting.plan.window.seconds + report.command_ms / 1000
            started.append(watched(sockets, job, partial(_start_in_vain, seconds))[0])
            left_alone.append(watched(sockets, job, partial(time.sleep, seconds))[0])
            setting.progress(
                f"upgrade of {volumes} {kind} volumes: round {turn + 1}/{setting.plan.rounds}: "
                f"{report.stall_ms:.1f} ms told, {seen.gap_ms:.1f} ms seen"
            )
    results.keep_raw(
        section,
        f"{volumes} volumes, {kind}",
        job,
        [
            {"seen": asdict(one), "told": asdict(told), "start": asdict(start), "left_alone": asdict(alone)}
            for one, told, start, alone in zip(upgraded, reports, started, left_alone, strict=True)
        ],
    )
    what = f"{volumes} {'volume' if volumes == 1 else 'volumes'}, {kind}"
    drained = max(report.drain_ms for report in reports)
    results.rows += [
        Row.beside(
            section,
            f"{what}: longest gap of any client",
            "ms",
            [seen.gap_ms for seen in upgraded],
            ("without an upgrade", [seen.gap_ms for seen in left_alone]),
            f"{median(seen.gap_ms for seen in started):.3g} ms where processes of the same kind only start: they "
            "take turns with the clients and the reactor on the cores there are",
            Bar("at most 20 ms", at_most=20.0),
            judge="figure",
        ),
        Row.told(
            section,
            f"{what}: pause that the command reports",
            "ms",
            [report.stall_ms for report in reports],
            f"at most {drained:.1f} ms of it to come to rest",
        ),
        Row.beside(
            section,
            f"{what}: p99.9 of the worst client",
            "us",
            [seen.p999_us for seen in upgraded],
            ("without an upgrade", [seen.p999_us for seen in left_alone]),
            f"{median(seen.p999_us for seen in started):,.0f} us where processes of the same kind only start; a "
            "pause of more than a thousandth of the window shows here",
        ),
    ]


def _upgrade_within(daemon: GatewayDaemon, setting: Setting) -> Upgraded:
    time.sleep(setting.plan.window.seconds / 2)
    report = daemon.upgrade()
    time.sleep(setting.plan.window.seconds / 2)
    return report


def _start_in_vain(seconds: float) -> None:
    """What an upgrade costs the cores without what it does: two Pythons import what the command and the new gateway
    do."""
    end = time.monotonic() + seconds
    time.sleep(seconds / 4)
    for module in (
        "ringstone.cli.app, ringstone.client",
        "ringstone.gateway.daemon, ringstone.gateway.server",
    ):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    time.sleep(max(0.0, end - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Seen:
    """What the clients of one window saw at worst: time without a completion, and p99.9."""

    gap_ms: float
    p999_us: float

    @classmethod
    def of(cls, reports: Sequence[PatternReport]) -> "Seen":
        return cls(
            max(report.longest_gap_ns for report in reports) / 1e6,
            max(report.latency.p999_ns for report in reports) / 1e3,
        )


def watched(sockets: Sequence[Path], job: dict[str, Any], within: Callable[[], T]) -> tuple[Seen, T]:
    """Run a client on every socket while `within` runs; the load ends with it."""
    with ExitStack() as stack:
        clients: list[RunningPattern] = [
            stack.enter_context(running_pattern(str(socket), **job, seed=index + 1))
            for index, socket in enumerate(sockets)
        ]
        value = within()
    return Seen.of([sound(client.report) for client in clients]), value


# A move.


@dataclass(frozen=True, slots=True)
class QueuePause:
    """Longest gap and p99.9 of the first queue, and of the worst of the others."""

    gap_ms: float
    p999_us: float
    others_gap_ms: float
    others_p999_us: float

    @classmethod
    def of(cls, report: PatternReport) -> "QueuePause":
        gaps = [gap / 1e6 for gap in report.queue_gaps_ns]
        tails = [latency.p999_ns / 1e3 for latency in report.queue_latency]
        return cls(gaps[0], tails[0], max(gaps[1:]), max(tails[1:]))


def move(setting: Setting, results: Results) -> None:
    """Move one queue of four between two reactors and back, again and again."""
    section = f"a queue that moves between two reactors, {MOVES_A_SECOND} times a second"
    cores = (setting.cores.server, setting.cores.client)
    directory = setting.directory / "move"
    directory.mkdir()
    moved: list[QueuePause] = []
    left_alone: list[QueuePause] = []
    counts: list[int] = []
    job = _job(setting.cores, RATE["memory"])
    with EngineProcess(directory, list(cores), balance=False) as engine:
        backend = json.dumps({"type": "memory", "path": None})
        socket = engine.serve("volume", backend, size=VOLUME_BYTES, queues=QUEUES)
        for turn in range(setting.plan.rounds):
            with running_pattern(str(socket), **job) as client:
                time.sleep(setting.plan.window.seconds)
            left_alone.append(QueuePause.of(sound(client.report)))
            with running_pattern(str(socket), **job) as client:
                before = _moves(engine)
                _move_to_and_fro(engine, cores, setting.plan.window.seconds)
                counts.append(_moves(engine) - before)
            moved.append(QueuePause.of(sound(client.report)))
            setting.progress(
                f"moves: round {turn + 1}/{setting.plan.rounds}: {counts[-1]} moves, {moved[-1].gap_ms:.1f} ms"
            )
    if not all(counts):
        raise RingstoneError("No queue moved. See the engine's log.")
    results.keep_raw(
        section,
        "ringstone",
        job,
        [
            {"moves": count, "moved": asdict(one), "left_alone": asdict(alone)}
            for count, one, alone in zip(counts, moved, left_alone, strict=True)
        ],
    )
    limit = (
        f"{min(counts)} moves and more in a window; the client has a core together with one of the reactors"
    )
    alone_gap = ("the same queue left alone", [pause.gap_ms for pause in left_alone])
    alone_tail = ("the same queue left alone", [pause.p999_us for pause in left_alone])
    others_gap = ("the queues beside it", [pause.others_gap_ms for pause in moved])
    others_tail = ("the queues beside it", [pause.others_p999_us for pause in moved])
    gaps, tails = [pause.gap_ms for pause in moved], [pause.p999_us for pause in moved]
    results.rows += [
        Row.beside(
            section,
            "longest gap of the moved queue",
            "ms",
            gaps,
            alone_gap,
            limit,
            Bar("at most 5 ms, a guest's own time slice", at_most=5.0),
            judge="figure",
        ),
        Row.beside(section, "longest gap of the moved queue", "ms", gaps, others_gap, limit),
        Row.beside(section, "p99.9 of the moved queue", "us", tails, alone_tail, limit),
        Row.beside(section, "p99.9 of the moved queue", "us", tails, others_tail, limit),
    ]


def _moves(engine: EngineProcess) -> int:
    return sum(queue.moves for queue in engine.snapshot().of_volume("volume"))


def _move_to_and_fro(engine: EngineProcess, cores: Sequence[int], seconds: float) -> None:
    """The first queue, beginning with the reactor that it is not on. A move begins when the one before has ended."""
    at = _reactor_of_first(engine) or 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        next_move = time.monotonic() + 1 / MOVES_A_SECOND
        before, at = _moves(engine), (at + 1) % len(cores)
        engine.call("move_queue", name="volume", queue=0, core=cores[at])
        while _moves(engine) == before or _reactor_of_first(engine) != at:
            if time.monotonic() > end + _MOVE_SECONDS:
                raise RingstoneError("A queue was told to move and did not. See the engine's log.")
            time.sleep(_LOOK_SECONDS)
        time.sleep(max(0.0, next_move - time.monotonic()))


def _reactor_of_first(engine: EngineProcess) -> int | None:
    (first,) = [queue for queue in engine.snapshot().of_volume("volume") if queue.index == 0]
    return first.reactor
