"""Reads and overwrites of what a volume has: a store's volume beside a file of the same drive."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from ringstone.bench import files, store_drive
from ringstone.bench.compare import Rounds, compare, limited_by
from ringstone.bench.gateway import Gateway
from ringstone.bench.machine import filesystem_of
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Shape
from ringstone.bench.spread import Bar

QUEUES = 4
DEPTHS = (1, 32, 128)
LEAST_IOPS = Bar("at least 0.97 of the file", at_least=0.97)
MORE_BUSY_NS = 60.0


def steady(setting: Setting, results: Results, depths: Sequence[int] = DEPTHS) -> None:
    """One volume of each kind, both written all over, each in an engine of its own on the same core. Then store and
    file change places, as the place on a drive may tell more than what is there: each round is the middle of both."""
    section = f"reads and overwrites, {setting.size >> 20} MiB, beside a file of the same drive"
    size = setting.size + store_drive.OVERHEAD
    with files.filled(setting.disk / "one", size) as one, files.filled(setting.disk / "other", size) as other:
        halves = [
            _half(setting, results, section, depths, store, file)
            for store, file in ((one, other), (other, one))
        ]
    for first, second in zip(*halves, strict=True):
        theirs, ours = (middle(*both) for both in zip(first, second, strict=True))
        results.rows += steady_rows(section, theirs, ours)


def _half(
    setting: Setting, results: Results, section: str, depths: Sequence[int], store: Path, file: Path
) -> list[tuple[Rounds, Rounds]]:
    """The file's and the store's, for each shape."""
    found = []
    with (
        store_drive.opened_on(setting, store) as drive,
        store_drive.started(setting, "file") as engine,
    ):
        drive.create("volume", setting.size)
        socket = drive.serve("volume", setting.size, queues=QUEUES)
        files.fill_volume(socket, setting.size, setting.cores)
        backend = json.dumps({"type": "file", "path": str(file)})
        engine.serve("file", backend, size=setting.size, queues=QUEUES)
        results.notes.append(
            f"Store on {store.name}, file on {file.name}, both on {filesystem_of(file)} and written all over before; "
            f"{engine.call('volumes')[0]['detail']}"
        )
        bare = Gateway(engine, "file", setting.cores, "file")
        ours = Gateway(drive.engine, "volume", setting.cores)
        for queues in (1, QUEUES):
            for depth in depths:
                reads = Shape(depth=depth, queues=queues)
                for shape in (reads, reads.writing().on_drive()):
                    theirs, mine = compare([(bare, shape), (ours, shape)], setting.plan, setting.progress)
                    results.keep(section, theirs, mine)
                    found.append((theirs, mine))
    return found


def middle(first: Rounds, second: Rounds) -> Rounds:
    """Each round in the middle between the same rounds of two runs."""
    return replace(
        first,
        measurements=tuple(
            replace(
                one,
                iops=(one.iops + other.iops) / 2,
                reactor=replace(one.reactor, busy_ns=(one.reactor.busy_ns + other.reactor.busy_ns) / 2)
                if one.reactor and other.reactor
                else None,
            )
            for one, other in zip(first.measurements, second.measurements, strict=True)
        ),
    )


def steady_rows(section: str, theirs: Rounds, ours: Rounds) -> list[Row]:
    """IOPS by their ratio, the reactor's busy time by what it is more than the file's, round by round."""
    return [iops_row(section, theirs, ours, LEAST_IOPS), *busy_rows(section, theirs, ours)]


def iops_row(section: str, theirs: Rounds, ours: Rounds, bar: Bar | None) -> Row:
    return Row.beside(
        section,
        f"{ours.shape}: IOPS",
        "IOPS",
        [one.iops for one in ours.measurements],
        (theirs.name, [one.iops for one in theirs.measurements]),
        limited_by(ours, device=True),
        bar,
    )


def busy_rows(section: str, theirs: Rounds, ours: Rounds) -> list[Row]:
    """None where the stats page counted no request."""
    rounds = [
        (reference.reactor.busy_ns, one.reactor.busy_ns)
        for reference, one in zip(theirs.measurements, ours.measurements, strict=True)
        if reference.reactor and one.reactor
    ]
    if not rounds:
        return []
    row = Row.beside(
        section,
        f"{ours.shape}: reactor busy per request",
        "ns",
        [mine for _, mine in rounds],
        (theirs.name, [reference for reference, _ in rounds]),
        "",
    )
    more = [mine - reference for reference, mine in rounds]
    return [judged_by_difference(row, more, Bar("at most 60 ns more", at_most=MORE_BUSY_NS))]


def judged_by_difference(row: Row, more: Sequence[float], bar: Bar) -> Row:
    """The row with a bar on the median of what each round has more than its reference."""
    middle = median(more)
    said = f"{middle:+.0f} {row.unit} ({min(more):+.0f}..{max(more):+.0f})"
    return row.model_copy(
        update={"bar": bar.text, "judged": middle, "passed": bar.met(middle), "limited_by": said}
    )
