"""One disk on one reactor and on two: IOPS, and what each reactor spends on a request.

With two cores the client has its core together with the second reactor, so two reactors cannot be seen at full speed
here. What a core of its own would give follows from the time that the first reactor, which has one, is busy for each
request.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

from ringstone.bench import compare as figures
from ringstone.bench import files, hugepages
from ringstone.bench.compare import Rounds, compare
from ringstone.bench.gateway import EngineProcess
from ringstone.bench.load import drive
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Cores, Measurement, ReactorUse, Shape, Window
from ringstone.bench.spread import Bar, Spread
from ringstone.stats import Snapshot

QUEUES = (1, 2, 4)
DEPTH = 32
MILLION = 1_000_000
# Readings in a window: each takes milliseconds of a core, and two are needed.
_LOOKS = 3
_SHAPES = (Shape(depth=DEPTH), Shape(depth=DEPTH).writing())
_VOLUMES = {"memory": {"type": "memory", "path": None}, "null": {"type": "null"}}


@dataclass(frozen=True, slots=True)
class ReactorShare:
    """What one reactor did between two readings."""

    core: int
    operations: int
    busy_ns: int

    @property
    def busy_ns_each(self) -> float:
        """For each request; 0 when there was none."""
        return self.busy_ns / self.operations if self.operations else 0.0


def reactor_shares(before: Snapshot, after: Snapshot) -> list[ReactorShare]:
    """By reactor. A queue's requests are counted where it is in `after`; it must not move in between, nor be set up
    anew."""
    started = {(queue.volume, queue.index, queue.generation): queue.operations for queue in before.queues}
    operations = [0] * len(after.reactors)
    for queue in after.queues:
        former = started.get((queue.volume, queue.index, queue.generation))
        if queue.reactor is not None and former is not None:
            operations[queue.reactor] += queue.operations - former
    return [
        ReactorShare(reactor.core, count, reactor.busy_ns - former.busy_ns)
        for reactor, former, count in zip(after.reactors, before.reactors, operations, strict=True)
    ]


def running(snapshots: Sequence[Snapshot], volume: str, queues: int) -> list[Snapshot]:
    """Those in which all queues of the client that was measured ran."""
    return [
        snapshot
        for snapshot in snapshots
        if sum(queue.reactor is not None for queue in snapshot.of_volume(volume)) >= queues
    ]


@dataclass(frozen=True, slots=True)
class SpreadVolume:
    """A volume whose reactors are looked at while it is measured."""

    engine: EngineProcess
    volume: str
    cores: Cores
    name: str

    def measure(self, shape: Shape, window: Window) -> Measurement:
        """`raw` has `reactors`; `reactor` is the first one, which has a core of its own."""
        socket = self.engine.socket_of(self.volume)
        snapshots = []
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(drive, socket, shape, window, self.cores)
            while not load.done():
                snapshots.append(self.engine.snapshot())
                time.sleep(window.seconds / _LOOKS)
        measured = Measurement.of(load.result())
        seen = running(snapshots, self.volume, shape.queues)
        if len(seen) < 2:
            return measured
        shares = reactor_shares(seen[0], seen[-1])
        first = shares[0]
        use = None
        if first.operations:
            elapsed = seen[-1].at_ns - seen[0].at_ns
            use = ReactorUse(first.busy_ns_each, min(1.0, first.busy_ns / elapsed))
        raw = measured.raw | {"reactors": [asdict(share) for share in shares]}
        return replace(measured, reactor=use, raw=raw)


def scaling(setting: Setting, results: Results, shapes: Sequence[Shape] = _SHAPES) -> None:
    """Memory and null volumes with 1, 2 and 4 queues on engines with one reactor and with two, in turn."""
    section = "one disk on one reactor and on two"
    server, client = setting.cores.server, setting.cores.client
    results.notes.append(
        f"{section[:1].upper()}{section[1:]}: the second reactor shares core {client} with the client, so the "
        "figures beside each other do not show what a second core gives; the rows per core are reckoned from the "
        "time the first reactor is busy."
    )
    with ExitStack() as stack:
        pages = hugepages.pages_for(setting.size, setting.size) + 8
        if stack.enter_context(hugepages.reserved(pages)) < pages:
            results.notes.append(f"Hugepages: {pages} could not be had; the rest is on 4 KiB pages.")
        engines = []
        for name, cores in (("one", [server]), ("two", [server, client])):
            directory = setting.directory / f"{name}-reactors"
            directory.mkdir()
            engine = stack.enter_context(EngineProcess(directory, cores, balance=False))
            for volume, backend in _VOLUMES.items():
                engine.serve(volume, json.dumps(backend), size=setting.size, queues=max(QUEUES))
            files.fill_volume(engine.socket_of("memory"), setting.size, setting.cores)
            engines.append(engine)
        for volume in _VOLUMES:
            for shape in shapes:
                _scale(section, volume, shape, engines, setting, results)


def _scale(
    section: str,
    volume: str,
    shape: Shape,
    engines: Sequence[EngineProcess],
    setting: Setting,
    results: Results,
) -> None:
    one, two = (
        SpreadVolume(engine, volume, setting.cores, name)
        for engine, name in zip(engines, ("one reactor", "two reactors"), strict=True)
    )
    contenders = [(volume_on, replace(shape, queues=queues)) for queues in QUEUES for volume_on in (one, two)]
    taken = compare(contenders, setting.plan, setting.progress)
    results.keep(f"{section}: {volume}", *taken)
    for single, both in zip(taken[::2], taken[1::2], strict=True):
        results.rows.append(
            Row.beside(
                section,
                f"{volume}, {both.shape}: two reactors",
                "IOPS",
                [one.iops for one in both.measurements],
                ("one reactor", [one.iops for one in single.measurements]),
                f"one reactor: {describe(single)}; two: {describe(both)}",
            )
        )
    results.rows += _per_core(section, f"{volume}, {taken[-2].shape}", taken[-2])


def _per_core(section: str, what: str, single: Rounds) -> list[Row]:
    """What a core of its own gives, from one reactor, of whose core nobody else has a part."""
    costs = [one.reactor.busy_ns for one in single.measurements if one.reactor]
    if not costs:
        return []
    return [
        Row.absolute(
            section,
            f"{what}: a reactor's core by itself, reckoned from its busy time",
            "IOPS",
            Spread.of([iops_of_core(cost) for cost in costs]),
            Bar("at least a million", at_least=MILLION),
            f"{min(costs):.0f} to {max(costs):.0f} ns busy per request; each further core adds as much as long as "
            "memory and the client keep up, which two cores cannot show",
        )
    ]


def iops_of_core(busy_ns: float) -> float:
    """Requests a second of a core that does nothing else."""
    return 1e9 / busy_ns


def describe(rounds: Rounds) -> str:
    """Each reactor's busy time for a request, and the client's share."""
    costs: dict[int, list[float]] = {}
    for one in rounds.measurements:
        for share in one.raw.get("reactors", []):
            if share["operations"]:
                costs.setdefault(share["core"], []).append(share["busy_ns"] / share["operations"])
    parts = [f"core {core} {sorted(each)[len(each) // 2]:.0f} ns" for core, each in sorted(costs.items())]
    client = rounds.middle(figures.client_busy)
    busy = "unknown" if client is None else f"{client:.0%}"
    return f"{' and '.join(parts) or 'reactors unknown'} busy per request, client {busy} busy"
