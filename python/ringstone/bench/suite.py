"""The whole table, section by section. What each bar is and why: docs/benchmarks.md."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ringstone.bench import compare as figures
from ringstone.bench import files, hugepages
from ringstone.bench.compare import Rounds, compare, limited_by
from ringstone.bench.fio import Fio
from ringstone.bench.gateway import EngineProcess, Gateway
from ringstone.bench.load import BareRing
from ringstone.bench.machine import filesystem_of
from ringstone.bench.qemu import AioMode, modes, serving
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Measurement, Shape
from ringstone.bench.spread import Bar, Spread
from ringstone.errors import RingstoneError, UnsupportedError

QUEUES = 4


def memory(setting: Setting, results: Results) -> None:
    """The memory volume and the null volume beside the bare ring; fairness between queues."""
    # The ring's volume and the gateway's, and a few pages for the clients' buffers.
    pages = hugepages.pages_for(setting.size, setting.size) + 8
    with ExitStack() as stack:
        stack.enter_context(setting.ahead())
        free = stack.enter_context(hugepages.reserved(pages))
        if free < pages:
            results.notes.append(f"Hugepages: {free} of {pages} could be had; the rest is on 4 KiB pages.")
        engine = stack.enter_context(EngineProcess(setting.directory, [setting.cores.server]))
        engine.serve("memory", json.dumps({"type": "memory", "path": None}), size=setting.size, queues=QUEUES)
        engine.serve("null", json.dumps({"type": "null"}), size=setting.size)
        details = {volume["name"]: volume["detail"] for volume in engine.call("volumes")}
        results.notes.append(f"Memory volume: {details['memory']}")
        files.fill_volume(engine.socket_of("memory"), setting.size, setting.cores)
        gateway = Gateway(engine, "memory", setting.cores)
        null = Gateway(engine, "null", setting.cores)
        _beside_the_ring(setting, results, gateway, null)
        _fairness(setting, results, gateway)


def _beside_the_ring(setting: Setting, results: Results, gateway: Gateway, null: Gateway) -> None:
    section = f"memory volume, {setting.size >> 20} MiB, beside the bare ring"
    ring = BareRing(setting.cores, setting.size)
    by_shape: dict[Shape, tuple[Rounds, Rounds]] = {}
    for depth in (1, 32):
        for shape in (Shape(depth=depth), Shape(depth=depth).writing()):
            bare, ours = compare([(ring, shape), (gateway, shape)], setting.plan, setting.progress)
            by_shape[shape] = (bare, ours)
            results.keep(section, bare, ours)
    nothing = {}
    for shape in (Shape(depth=32), Shape(depth=32).writing()):
        (nothing[shape],) = compare([(null, shape)], setting.plan, setting.progress)
        results.keep(section, nothing[shape])

    for shape in (Shape(depth=1), Shape(depth=1).writing()):
        bare, ours = by_shape[shape]
        bar = Bar("mean at most 1.3 times the ring's", at_most=1.3)
        results.rows.append(_row(section, f"{shape}: mean", "ns", ours, bare, figures.mean_ns, bar))
    for shape in (Shape(depth=32), Shape(depth=32).writing()):
        bare, ours = by_shape[shape]
        results.rows.append(_throughput_row(section, ours, bare, nothing[shape]))
        for rounds, volume, most in ((ours, "memory", 600.0), (nothing[shape], "null", 250.0)):
            busy = Spread.of([one.reactor.busy_ns for one in rounds.measurements if one.reactor])
            what = f"{shape}: reactor busy per request, {volume} volume"
            bar = Bar(f"at most {most:.0f} ns", at_most=most)
            results.rows.append(Row.absolute(section, what, "ns", busy, bar, limited_by(rounds)))
    for depth in (1, 32):
        reads, writes = by_shape[Shape(depth=depth)][1], by_shape[Shape(depth=depth).writing()][1]
        bar = Bar("writes at least 0.9 of reads", at_least=0.9)
        what = f"depth {depth}: writes beside reads"
        results.rows.append(_row(section, what, "IOPS", writes, reads, figures.iops, bar, "reads"))


def _throughput_row(section: str, ours: Rounds, bare: Rounds, nothing: Rounds) -> Row:
    """At least 75 % of the ring; or the client saturated and the reactor cheap, which is the same told from
    the server's side when the client cannot ask for more."""
    bar = Bar(
        "at least 0.75 of the ring; or client saturated and at most 600 ns busy (250 on null)", at_least=0.75
    )
    row = _row(section, f"{ours.shape}", "IOPS", ours, bare, figures.iops, bar)
    client = ours.middle(figures.client_busy)
    cost, floor = ours.middle(figures.reactor_busy_ns), nothing.middle(figures.reactor_busy_ns)
    if client is not None and client >= figures.SATURATED and cost is not None and floor is not None:
        row.passed = row.passed or (cost <= 600 and floor <= 250)
    return row


def _fairness(setting: Setting, results: Results, gateway: Gateway) -> None:
    section = "four queues of one volume on one reactor"
    one, four = Shape(depth=8 * QUEUES), Shape(depth=8, queues=QUEUES)
    alone, together = compare([(gateway, one), (gateway, four)], setting.plan, setting.progress)
    results.keep(section, alone, together)
    bar = Bar("worst queue's p99 at most 2 times that of one queue at the same total depth", at_most=2.0)
    ratios = [
        figures.worst_queue_p99_ns(many) / single.p99_ns
        for many, single in zip(together.measurements, alone.measurements, strict=True)
    ]
    results.rows.append(
        Row.relative(
            section,
            f"{four}: p99 of the worst queue",
            "ns",
            together.spread(figures.worst_queue_p99_ns),
            ("one queue", alone.spread(figures.p99_ns)),
            Spread.of(ratios),
            bar,
            limited_by(together),
        )
    )
    least = [min(many.queue_iops) / max(many.queue_iops) for many in together.measurements]
    results.rows.append(
        Row.absolute(
            section,
            f"{four}: slowest queue's IOPS over the fastest one's",
            "",
            Spread.of(least),
            Bar("at least 0.8", at_least=0.8),
            limited_by(together),
        )
    )


def tmpfs(setting: Setting, results: Results) -> None:
    """One file on tmpfs, served by the gateway and by qemu-storage-daemon in the best of its modes."""
    section = f"one file on tmpfs, {setting.size >> 20} MiB, beside qemu-storage-daemon"
    ring = BareRing(setting.cores, setting.size, hugepages=False)
    with ExitStack() as stack:
        stack.enter_context(setting.ahead())
        file = stack.enter_context(files.filled(setting.directory / "volume", setting.size))
        engine = stack.enter_context(EngineProcess(setting.directory, [setting.cores.server]))
        gateway = _serve_file(engine, file, setting, results)
        for depth, least in ((1, 3.0), (32, 6.0)):
            for shape in (Shape(depth=depth), Shape(depth=depth).writing()):
                mode = best_mode(file, shape, setting, direct_only=False)
                with serving(file, mode, setting.cores, setting.directory) as daemon:
                    theirs, bare, ours = compare(
                        [(daemon, shape), (ring, shape), (gateway, shape)], setting.plan, setting.progress
                    )
                results.keep(section, theirs, bare, ours)
                bar = Bar(f"at least {least:g} times qemu-storage-daemon", at_least=least)
                row = _row(section, f"{shape}", "IOPS", ours, theirs, figures.iops, bar)
                share, reach = ours.ratio(bare, figures.iops), bare.ratio(theirs, figures.iops)
                row.limited_by += (
                    f"; {share.median:.2f} of the {bare.name}, which itself is {reach.median:.2f} times "
                    "qemu-storage-daemon"
                )
                results.rows.append(row)


def disk(setting: Setting, results: Results) -> None:
    """One O_DIRECT file on a drive, beside qemu-storage-daemon and fio's io_uring engine."""
    section = f"one O_DIRECT file on a drive, {setting.size >> 20} MiB"
    with ExitStack() as stack:
        file = stack.enter_context(files.filled(setting.disk / "volume", setting.size))
        engine = stack.enter_context(EngineProcess(setting.directory, [setting.cores.server]))
        gateway = _serve_file(engine, file, setting, results)
        fio = Fio(file, setting.cores)
        for depth, least in ((1, 0.9), (32, 0.95), (128, 0.95)):
            for shape in (Shape(depth=depth), Shape(depth=depth).writing().on_drive()):
                mode = best_mode(file, shape, setting, direct_only=True)
                with serving(file, mode, setting.cores, setting.directory) as daemon:
                    theirs, bare, ours = compare(
                        [(daemon, shape), (fio, shape), (gateway, shape)], setting.plan, setting.progress
                    )
                results.keep(section, theirs, bare, ours)
                for reference, bar in (
                    (theirs, Bar("not below qemu-storage-daemon", at_least=1.0)),
                    (bare, Bar(f"at least {least:g} of fio on the bare file", at_least=least)),
                ):
                    row = _row(section, f"{shape}", "IOPS", ours, reference, figures.iops, bar, device=True)
                    results.rows.append(row)


def _serve_file(engine: EngineProcess, file: Path, setting: Setting, results: Results) -> Gateway:
    engine.serve("file", json.dumps({"type": "file", "path": str(file)}), size=setting.size)
    detail = engine.call("volumes")[0]["detail"]
    results.notes.append(f"File volume on {filesystem_of(file)}: {detail}")
    return Gateway(engine, "file", setting.cores)


def best_mode(file: Path, shape: Shape, setting: Setting, *, direct_only: bool) -> AioMode:
    """The mode in which qemu-storage-daemon does most with this shape; one that does not start is told and
    left out."""
    reached: dict[AioMode, float] = {}
    for mode in modes(direct_only=direct_only):
        try:
            with serving(file, mode, setting.cores, setting.directory) as daemon:
                reached[mode] = daemon.measure(shape, setting.plan.settle).iops
        except RingstoneError as error:
            setting.progress(f"{shape}: {mode} is left out: {error}")
            continue
        setting.progress(f"{shape}: {daemon.name}: {reached[mode]:,.0f} IOPS")
    if not reached:
        raise UnsupportedError(
            "qemu-storage-daemon runs in none of its modes. Start it by hand on a file to see why."
        )
    return max(reached, key=lambda mode: reached[mode])


def _row(
    section: str,
    what: str,
    unit: str,
    ours: Rounds,
    reference: Rounds,
    figure: Callable[[Measurement], float],
    bar: Bar,
    name: str | None = None,
    *,
    device: bool = False,
) -> Row:
    return Row.relative(
        section,
        what,
        unit,
        ours.spread(figure),
        (name or reference.name, reference.spread(figure)),
        ours.ratio(reference, figure),
        bar,
        limited_by(ours, device=device),
    )
