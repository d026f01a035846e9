"""A quiet volume beside hostile frontends of others on the same reactor: what their storms do to its latency."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol, Self

from ringstone.bench import storms
from ringstone.bench.daemon import GatewayDaemon
from ringstone.bench.greedy import REQUEST_BYTES, LongReads
from ringstone.bench.pattern import running_pattern, sound
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Cores
from ringstone.bench.spread import Bar, Spread
from ringstone.errors import RingstoneError
from ringstone.stats import Histogram, Snapshot, StatsPage

VOLUME_BYTES = 64 << 20
# Of the quiet volume: few, so that its latency is what the reactor makes of it.
RATE = 4000
DEPTH = 4
_MORE_SECONDS = 60.0


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
    longest_gap_ns: float = 0


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
        if named is None:
            daemon.make_pool("drive", "file", setting.disk / "neighbours-drive")
            for where, pool in (("memory", "pool"), ("a hole in a file", "drive"), ("a file", "drive")):
                volume = where.replace(" ", "-")
                greedy = daemon.serve(volume, pool, size=VOLUME_BYTES, queues=8)
                if where == "a file":
                    _fill(setting.disk / "neighbours-drive" / f"{volume}.raw")
                reads = partial(LongReads, str(greedy), queues=8, cores=[setting.cores.client])
                name = f"reads of {REQUEST_BYTES >> 20} MiB of {where} in 8 queues"
                _beside_greedy(name, reads, quiet, stats, setting, results)


def _fill(backing: Path) -> None:
    """Data in place of holes, from behind the gateway: nobody reads the volume yet."""
    with backing.open("r+b") as file:
        for _ in range(VOLUME_BYTES >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())


def _beside_greedy(
    name: str,
    storm: Callable[[], Storm],
    quiet: Path,
    stats: StatsPage,
    setting: Setting,
    results: Results,
) -> None:
    """Longest gap and p99 of the quiet volume's client, which wait for the greedy guest's turns too."""
    section = "a quiet volume beside a guest that asks for as much as it can"
    calm, stormy, counts = _windows(name, storm, quiet, stats, setting)
    results.keep_raw(section, name, _job(setting), _raw(calm, stormy, counts))
    done = f"{min(counts) / setting.plan.window.seconds:,.0f} of them a second"
    results.rows += [
        Row.beside(
            section,
            f"{name}: p99 of the client",
            "us",
            [tail.client_ns / 1e3 for tail in stormy],
            ("without", [tail.client_ns / 1e3 for tail in calm]),
            done,
            Bar("at most 3 times", at_most=3.0),
        ),
        Row.absolute(
            section,
            f"{name}: longest gap of the client",
            "ms",
            Spread.of([tail.longest_gap_ns / 1e6 for tail in stormy]),
            Bar("at most 2 ms", at_most=2.0),
            f"without it {median(tail.longest_gap_ns for tail in calm) / 1e6:.2f} ms",
        ),
    ]


def _beside(
    section: str,
    name: str,
    storm: Callable[[], Storm],
    quiet: Path,
    stats: StatsPage,
    setting: Setting,
    results: Results,
) -> None:
    calm, stormy, counts = _windows(name, storm, quiet, stats, setting)
    results.keep_raw(section, name, _job(setting), _raw(calm, stormy, counts))
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


def _windows(
    name: str, storm: Callable[[], Storm], quiet: Path, stats: StatsPage, setting: Setting
) -> tuple[list[Tail], list[Tail], list[int]]:
    """Rounds without the storm and with it, in turn, and how often it did what it does in each."""
    calm: list[Tail] = []
    stormy: list[Tail] = []
    counts: list[int] = []
    for turn in range(setting.plan.rounds):
        calm.append(_window(quiet, stats, setting))
        with storm() as raging:
            _await_more(raging, name, than=0)
            before = raging.count
            stormy.append(_window(quiet, stats, setting))
            counts.append(raging.count - before)
            # One that has ended meanwhile would have measured calm.
            _await_more(raging, name, than=raging.count)
        setting.progress(f"{name}: round {turn + 1}/{setting.plan.rounds}: {counts[-1]} times")
    return calm, stormy, counts


def _raw(calm: list[Tail], stormy: list[Tail], counts: list[int]) -> list[dict[str, Any]]:
    return [
        {"count": count, "storm": asdict(one), "calm": asdict(other)}
        for count, one, other in zip(counts, stormy, calm, strict=True)
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
    return Tail(reactor_p99(before, after, "quiet"), report.latency.p99_ns, requests, report.longest_gap_ns)


def default_storms(cores: Cores) -> list[tuple[str, StormFactory]]:
    """By what they do. They share the client's core: the reactor has the other one."""
    ours = [cores.client]
    return [
        ("SET_MEM_TABLE of 256 GiB", partial(storms.MemoryTables, cores=ours)),
        ("ADD_MEM_REG and REM_MEM_REG", partial(storms.MemorySlots, cores=ours)),
        ("connect and disconnect", partial(storms.Connections, cores=ours)),
        ("questions whose answers nobody reads", partial(storms.DeafFrontend, cores=ours)),
    ]


def _await_more(raging: Storm, name: str, *, than: int) -> None:
    deadline = time.monotonic() + _MORE_SECONDS
    while raging.count <= than:
        if time.monotonic() > deadline:
            raise RingstoneError(f"The storm of {name} does nothing (any more). See the gateway's log.")
        time.sleep(0.001)
