"""A quiet volume beside hostile frontends of others on the same reactor: what their storms do to its latency."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ringstone.bench import storms
from ringstone.bench.daemon import GatewayDaemon
from ringstone.bench.pattern import running_pattern, sound
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Cores
from ringstone.bench.spread import Bar
from ringstone.errors import RingstoneError
from ringstone.stats import Histogram, Snapshot, StatsPage

VOLUME_BYTES = 64 << 20
# Of the quiet volume: few, so that its latency is what the reactor makes of it.
RATE = 4000
DEPTH = 4
_START_SECONDS = 60.0


class Storm(Protocol):
    """Something a hostile frontend does again and again while it is entered; `count` says how often it has."""

    count: int

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


# Makes a storm on the volume that listens at a socket.
StormFactory = Callable[[str], Storm]


@dataclass(frozen=True, slots=True)
class Tail:
    """p99 of the quiet volume in one window: as the reactor counts it, and as the client does."""

    reactor_ns: float
    client_ns: float
    requests: int


def reactor_p99(before: Snapshot, after: Snapshot, volume: str) -> float:
    """From the histograms of both readings; RingstoneError when nothing was served in between."""
    p99 = (_latency(after, volume).since(_latency(before, volume))).percentile(0.99)
    if p99 is None:
        raise RingstoneError(f"Nothing was served to {volume} in the window. See the gateway's log.")
    return p99


def _latency(snapshot: Snapshot, volume: str) -> Histogram:
    total = Histogram()
    for queue in snapshot.of_volume(volume):
        total = total + queue.read_latency + queue.write_latency
    return total


def neighbours(
    setting: Setting, results: Results, named: Sequence[tuple[str, StormFactory]] | None = None
) -> None:
    """A window with each storm and one without, in turn. `named`: default_storms() unless given."""
    section = "a quiet volume beside hostile neighbours on the same reactor"
    with ExitStack() as stack:
        run, state = setting.directory / "neighbours", setting.disk / "neighbours"
        run.mkdir()
        daemon = stack.enter_context(GatewayDaemon(run, state, [setting.cores.server], "--no-balance"))
        daemon.start()
        daemon.make_pool("pool", "memory", setting.directory / "neighbours-pool")
        quiet = daemon.serve("quiet", "pool", size=VOLUME_BYTES, queues=1)
        noisy = daemon.serve("noisy", "pool", size=VOLUME_BYTES, queues=4)
        stats = stack.enter_context(StatsPage(daemon.stats_path))
        for name, storm in default_storms(setting.cores) if named is None else named:
            _beside(section, name, partial(storm, str(noisy)), quiet, stats, setting, results)


def _beside(
    section: str,
    name: str,
    storm: Callable[[], Storm],
    quiet: Path,
    stats: StatsPage,
    setting: Setting,
    results: Results,
) -> None:
    calm: list[Tail] = []
    stormy: list[Tail] = []
    counts: list[int] = []
    for turn in range(setting.plan.rounds):
        calm.append(_window(quiet, stats, setting))
        with storm() as raging:
            _await_first(raging, name)
            before = raging.count
            stormy.append(_window(quiet, stats, setting))
            counts.append(raging.count - before)
        setting.progress(f"{name}: round {turn + 1}/{setting.plan.rounds}: {counts[-1]} times")
    results.keep_raw(
        section,
        name,
        _job(setting),
        [
            {"count": count, "storm": asdict(one), "calm": asdict(other)}
            for count, one, other in zip(counts, stormy, calm, strict=True)
        ],
    )
    rate = min(counts) / setting.plan.window.seconds
    bar = Bar("at most 2 times", at_most=2.0)
    results.rows += [
        Row.beside(
            section,
            f"{name}: p99 in the reactor",
            "us",
            [tail.reactor_ns / 1e3 for tail in stormy],
            ("without", [tail.reactor_ns / 1e3 for tail in calm]),
            f"{rate:,.0f} times a second",
            bar,
        ),
        Row.beside(
            section,
            f"{name}: p99 of the client",
            "us",
            [tail.client_ns / 1e3 for tail in stormy],
            ("without", [tail.client_ns / 1e3 for tail in calm]),
            f"{rate:,.0f} times a second; the storm and the quiet client have one core together",
            bar,
        ),
    ]


def _job(setting: Setting) -> dict[str, Any]:
    return {
        "queues": 1,
        "depth": DEPTH,
        "rate": RATE,
        "flush_share": 0,
        "span_bytes": 16 << 20,
        "cores": [setting.cores.client],
    }


def _window(socket: Path, stats: StatsPage, setting: Setting) -> Tail:
    with running_pattern(str(socket), **_job(setting)) as client:
        before = stats.read()
        time.sleep(setting.plan.window.seconds)
        after = stats.read()
    report = sound(client.report)
    requests = report.operations.read + report.operations.write
    return Tail(reactor_p99(before, after, "quiet"), report.latency.p99_ns, requests)


def default_storms(cores: Cores) -> list[tuple[str, StormFactory]]:
    """By what they do. They share the client's core: the reactor has the other one."""
    ours = [cores.client]
    return [
        ("SET_MEM_TABLE of 256 GiB", partial(storms.MemoryTables, cores=ours)),
        ("ADD_MEM_REG and REM_MEM_REG", partial(storms.MemorySlots, cores=ours)),
        ("connect and disconnect", partial(storms.Connections, cores=ours)),
        ("questions whose answers nobody reads", partial(storms.DeafFrontend, cores=ours)),
    ]


def _await_first(raging: Storm, name: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not raging.count:
        if time.monotonic() > deadline:
            raise RingstoneError(f"The storm of {name} did not begin. See the gateway's log.")
        time.sleep(0.001)
