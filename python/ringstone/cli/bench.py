"""`ringstone bench`"""

import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ringstone.bench import commands as waiting
from ringstone.bench import compare as figures
from ringstone.bench import hypervisors as qemus
from ringstone.bench import rbd as ceph
from ringstone.bench import resilience as recovery
from ringstone.bench import rest, single, suite
from ringstone.bench import store as stores
from ringstone.bench.compare import Plan, Progress, Rounds, limited_by
from ringstone.bench.machine import describe
from ringstone.bench.results import Results, figure, ratio_text
from ringstone.bench.rings import require_ringstone
from ringstone.bench.setting import prepared
from ringstone.bench.shape import Cores, Shape, Window
from ringstone.bench.spread import Spread
from ringstone.cli.context import JsonOption, context_of, print_json, print_table, size_argument
from ringstone.errors import InvalidError
from ringstone.units import format_latency

app = typer.Typer(
    help="Measure the gateway beside the limits of this machine (docs/benchmarks.md).", no_args_is_help=True
)


class VolumeType(StrEnum):
    MEMORY = "memory"
    FILE = "file"
    NULL = "null"


class Against(StrEnum):
    LIMIT = "limit"
    QEMU = "qemu-storage-daemon"
    FIO = "fio"


class Section(StrEnum):
    MEMORY = "memory"
    TMPFS = "tmpfs"
    DISK = "disk"
    REST = "rest"


Depth = Annotated[int, typer.Option(min=1, max=1024, help="Requests in flight in each queue.")]
BlockSize = Annotated[int, typer.Option("--bs", parser=size_argument, metavar="SIZE", help="Block size.")]
ReadShare = Annotated[int, typer.Option(min=0, max=100, help="Percent of the requests that read.")]
Sequential = Annotated[bool, typer.Option("--sequential", help="One block after the other, not at random.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Length of one round.")]
Warmup = Annotated[float, typer.Option(min=0.0, help="Seconds before each round that do not count.")]
RoundCount = Annotated[int, typer.Option("--rounds", min=1, help="Rounds of each contender, in turn.")]
Size = Annotated[int, typer.Option(parser=size_argument, metavar="SIZE", help="Size of the volume.")]
ServerCore = Annotated[int, typer.Option(min=0, help="Core of the side that serves.")]
ClientCore = Annotated[int, typer.Option(min=0, help="Core of the side that asks.")]
Realtime = Annotated[
    bool,
    typer.Option("--realtime", help="Run ahead of other work (SCHED_FIFO; root), but not on a drive."),
]


@app.command("limit")
def limit(
    context: typer.Context,
    depth: Depth = 1,
    bs: BlockSize = "4K",  # type: ignore[assignment]  # typer parses defaults too
    read_share: ReadShare = 100,
    sequential: Sequential = False,
    size: Size = "1G",  # type: ignore[assignment]
    seconds: Seconds = 2.0,
    warmup: Warmup = 0.3,
    rounds: RoundCount = 3,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    realtime: Realtime = False,
    json_output: JsonOption = False,
) -> None:
    """Measure a bare shared-memory ring between two cores with one copy per request."""
    cli = context_of(context, json_output)
    shape = Shape(depth, 1, bs, read_share, "sequential" if sequential else "random")
    plan = Plan(rounds, Window(seconds, warmup))
    cores = Cores(server_core, client_core)
    with prepared(
        cores=cores, plan=plan, progress=_progress(cli.json), size=size, realtime=realtime
    ) as setting:
        measured = single.limit(shape, setting)
    _show((measured,), as_json=cli.json)


@app.command("gateway")
def gateway(
    context: typer.Context,
    socket: Annotated[
        Path | None, typer.Option("--socket", help="A vhost-user-blk socket; default: an engine of its own.")
    ] = None,
    volume_type: Annotated[
        VolumeType, typer.Option(help="The volume of the engine that is started.")
    ] = VolumeType.MEMORY,
    file: Annotated[
        Path | None,
        typer.Option(
            help="File or block device of a file volume; one that is not there is made and removed."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write to --file although it exists.")
    ] = False,
    against: Annotated[
        Against | None,
        typer.Option(help="Also measure this, in turn; qemu-storage-daemon and fio on the same file."),
    ] = None,
    depth: Depth = 1,
    queues: Annotated[int, typer.Option(min=1, max=64, help="Queues to use.")] = 1,
    bs: BlockSize = "4K",  # type: ignore[assignment]
    read_share: ReadShare = 100,
    sequential: Sequential = False,
    size: Size = "1G",  # type: ignore[assignment]
    seconds: Seconds = 2.0,
    warmup: Warmup = 0.3,
    rounds: RoundCount = 3,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    realtime: Realtime = False,
    json_output: JsonOption = False,
) -> None:
    """Measure a vhost-user-blk backend."""
    cli = context_of(context, json_output)
    shape = Shape(depth, queues, bs, read_share, "sequential" if sequential else "random")
    subject = single.Subject(
        socket, volume_type.value, file, overwrite, against.value if against is not None else None
    )
    plan = Plan(rounds, Window(seconds, warmup))
    cores = Cores(server_core, client_core)
    with prepared(
        cores=cores, plan=plan, progress=_progress(cli.json), size=size, realtime=realtime
    ) as setting:
        measured = single.gateway(subject, shape, setting)
    _show(measured, as_json=cli.json)


@app.command("suite")
def whole_suite(
    context: typer.Context,
    only: Annotated[list[Section] | None, typer.Option(help="Sections to run; default: all.")] = None,
    name: Annotated[str, typer.Option(help="Part of the result's file name.")] = "gateway",
    output: Annotated[Path, typer.Option(help="Directory for the table and the raw figures.")] = Path(
        "bench/results"
    ),
    disk: Annotated[Path, typer.Option(help="Directory on the drive to measure.")] = Path("/var/tmp"),
    size: Size = "1G",  # type: ignore[assignment]
    seconds: Seconds = 2.0,
    warmup: Warmup = 0.3,
    rounds: RoundCount = 5,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    realtime: Realtime = False,
    json_output: JsonOption = False,
) -> None:
    """Measure the whole table, judge it, and write it down."""
    cli = context_of(context, json_output)
    _check_name(name)
    plan = Plan(rounds, Window(seconds, warmup))
    results = Results(name=name, plan=plan.text, machine=describe())
    if realtime:
        results.notes.append("Scheduling: contenders on memory and tmpfs ran under SCHED_FIFO, all of them.")
    cores = Cores(server_core, client_core)
    with prepared(
        cores=cores, plan=plan, progress=_progress(cli.json), size=size, disk=disk, realtime=realtime
    ) as setting:
        for section in only or list(Section):
            _SECTIONS[section](setting, results)
    _write(results, output, as_json=cli.json)


@app.command("resilience")
def resilience(
    context: typer.Context,
    only: Annotated[
        list[recovery.Part] | None, typer.Option(help="Parts to run; default: all there is something for.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Directory of another build of Ringstone, as `pip install --target` makes it, to run beside this one."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Part of the result's file name.")] = "resilience",
    output: Annotated[Path, typer.Option(help="Directory for the table and the raw figures.")] = Path(
        "bench/results"
    ),
    disk: Annotated[Path, typer.Option(help="Directory on the drive to measure.")] = Path("/var/tmp"),
    size: Size = "1G",  # type: ignore[assignment]
    seconds: Seconds = 1.0,
    warmup: Warmup = 0.2,
    rounds: RoundCount = 5,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    realtime: Realtime = False,
    json_output: JsonOption = False,
) -> None:
    """Measure how long guests wait when the gateway crashes, is upgraded or moves their queues, what hostile
    neighbours cost them, and what one disk on many cores, packed rings and the in-flight region do."""
    cli = context_of(context, json_output)
    _check_name(name)
    parts = recovery.chosen(only, against)
    plan = Plan(rounds, Window(seconds, warmup))
    results = Results(name=name, command=recovery.COMMAND, plan=plan.text, machine=describe())
    cores = Cores(server_core, client_core)
    with prepared(
        cores=cores, plan=plan, progress=_progress(cli.json), size=size, disk=disk, realtime=realtime
    ) as setting:
        recovery.run(parts, against, setting, results)
    _write(results, output, as_json=cli.json)


@app.command("rbd")
def rbd(
    context: typer.Context,
    conf: Annotated[
        Path | None,
        typer.Option(help="ceph.conf of a cluster; default: one of the lab's, for this run alone."),
    ] = None,
    user: Annotated[str, typer.Option(help="Its user, without `client.`.")] = "admin",
    pool: Annotated[str, typer.Option(help="Its pool, in which an image is made and removed.")] = "rbd",
    depth: Annotated[
        list[int] | None, typer.Option(min=1, max=1024, help="Depths; default: 1, 32 and 128.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Also measure another build of Ringstone, as `pip install --target` makes it."),
    ] = None,
    name: Annotated[str, typer.Option(help="Part of the result's file name.")] = "rbd",
    output: Annotated[Path, typer.Option(help="Directory for the table and the raw figures.")] = Path(
        "bench/results"
    ),
    size: Size = "512M",  # type: ignore[assignment]
    seconds: Seconds = 1.5,
    warmup: Warmup = 0.5,
    rounds: RoundCount = 5,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    json_output: JsonOption = False,
) -> None:
    """Measure the gateway beside fio's rbd engine and qemu-storage-daemon, on one image of a Ceph cluster."""
    cli = context_of(context, json_output)
    _check_name(name)
    plan = Plan(rounds, Window(seconds, warmup))
    results = Results(name=name, command=ceph.COMMAND, plan=plan.text, machine=describe())
    cores = Cores(server_core, client_core)
    with ExitStack() as stack:
        if against is not None:
            require_ringstone(against)
        setting = stack.enter_context(
            prepared(cores=cores, plan=plan, progress=_progress(cli.json), size=size)
        )
        if conf is None:
            cluster = stack.enter_context(ceph.cluster_of_the_lab(results))
        else:
            cluster = ceph.Cluster(conf, user, pool)
        ceph.rbd(cluster, setting, results, depths=depth or ceph.DEPTHS, against=against)
    _write(results, output, as_json=cli.json)


@app.command("store")
def store(
    context: typer.Context,
    only: Annotated[list[stores.Part] | None, typer.Option(help="Parts to run; default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small, short and not written down: to see that it works.")
    ] = False,
    name: Annotated[str, typer.Option(help="Part of the result's file name.")] = "store",
    output: Annotated[Path, typer.Option(help="Directory for the table and the raw figures.")] = Path(
        "bench/results"
    ),
    disk: Annotated[Path, typer.Option(help="Directory on the drive to measure.")] = Path("/var/tmp"),
    size: Size = "1G",  # type: ignore[assignment]
    seconds: Seconds = 1.0,
    warmup: Warmup = 0.2,
    rounds: RoundCount = 5,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    json_output: JsonOption = False,
) -> None:
    """Measure volumes of a store beside a file of the same drive and beside qcow2: first writes, snapshots, clones."""
    cli = context_of(context, json_output)
    _check_name(name)
    plan = Plan(rounds, Window(seconds, warmup))
    if quick:
        plan, size = stores.QUICK_PLAN, min(size, stores.QUICK_BYTES)
    results = Results(name=name, command=stores.COMMAND, plan=plan.text, machine=describe())
    cores = Cores(server_core, client_core)
    with prepared(cores=cores, plan=plan, progress=_progress(cli.json), size=size, disk=disk) as setting:
        stores.run(only or list(stores.Part), setting, results)
    _write(results, None if quick else output, as_json=cli.json)


@app.command("commands")
def commands(
    context: typer.Context,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Also measure another build of Ringstone: its program, or a directory as of `pip install --target`."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Part of the result's file name.")] = "commands",
    output: Annotated[Path, typer.Option(help="Directory for the table and the raw figures.")] = Path(
        "bench/results"
    ),
    rounds: RoundCount = 20,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    json_output: JsonOption = False,
) -> None:
    """Measure how long a person waits for a command, with a gateway that answers."""
    cli = context_of(context, json_output)
    _check_name(name)
    other = waiting.other_build(against) if against is not None else None
    plan = f"{rounds} rounds, in each of which every build runs the command once"
    results = Results(name=name, command=waiting.COMMAND, plan=plan, machine=describe())
    cores = Cores(server_core, client_core)
    with prepared(cores=cores, plan=Plan(rounds), progress=_progress(cli.json)) as setting:
        waiting.commands(setting, results, other)
    _write(results, output, as_json=cli.json)


@app.command("hypervisors")
def hypervisors(
    context: typer.Context,
    programs: Annotated[
        list[Path],
        typer.Option("--qemu", help="A QEMU to measure; at least two, in the order to compare them in."),
    ],
    name: Annotated[str, typer.Option(help="Part of the result's file name.")] = "hypervisors",
    output: Annotated[Path, typer.Option(help="Directory for the table and the raw figures.")] = Path(
        "bench/results"
    ),
    size: Size = "256M",  # type: ignore[assignment]  # typer parses defaults too
    seconds: Seconds = 2.0,
    rounds: RoundCount = 5,
    server_core: ServerCore = 0,
    client_core: ClientCore = 1,
    json_output: JsonOption = False,
) -> None:
    """Measure the same guest on a volume under several versions of QEMU."""
    cli = context_of(context, json_output)
    _check_name(name)
    contenders = qemus.hypervisors_of(programs)
    plan = f"{rounds} rounds of {seconds:g} s in each guest in turn"
    results = Results(name=name, command=qemus.COMMAND, plan=plan, machine=describe())
    cores = Cores(server_core, client_core)
    with prepared(cores=cores, plan=Plan(rounds), progress=_progress(cli.json), size=size) as setting:
        qemus.hypervisors(setting, results, contenders, seconds)
    _write(results, output, as_json=cli.json)


def _check_name(name: str) -> None:
    if "/" in name or not name:
        raise InvalidError(f"{name!r} cannot be part of a file name. Use letters, digits and dashes.")


def _write(results: Results, output: Path | None, *, as_json: bool) -> None:
    """`output`: None for what is only shown."""
    written = results.write(output) if output is not None else None
    if as_json:
        print_json(results)
        return
    for section_name in dict.fromkeys(row.section for row in results.rows):
        print_table(_section_table(results, section_name))
    if output is None:
        print("\n".join(results.notes))
        print(f"{results.verdict}; not written down.")
    else:
        print(f"{results.verdict}; written to {output / 'README.md'} and {written}.")


_SECTIONS = {
    Section.MEMORY: suite.memory,
    Section.TMPFS: suite.tmpfs,
    Section.DISK: suite.disk,
    Section.REST: rest.at_rest,
}


def _progress(quiet: bool) -> Progress:
    """One line on the terminal that each step replaces; lines where there is none; nothing beside JSON."""
    if quiet:
        return lambda text: None
    if not sys.stderr.isatty():
        return lambda text: print(text, file=sys.stderr, flush=True)
    console = Console(stderr=True)
    return lambda text: console.print(f"\r\x1b[2K{text}", end="", markup=False, highlight=False)


def _show(measured: tuple[Rounds, ...], *, as_json: bool) -> None:
    """The subject is the last one; a reference comes before it."""
    subject = measured[-1]
    if as_json:
        print_json({"contenders": [_plain(rounds) for rounds in measured], "limited_by": limited_by(subject)})
        return
    table = Table("contender", title=str(subject.shape), box=None, header_style="bold")
    for column in ("IOPS", "mean", "p99", "reactor per request", "client busy"):
        table.add_column(column, justify="right")
    for rounds in measured:
        busy, client = rounds.middle(figures.reactor_busy_ns), rounds.middle(figures.client_busy)
        table.add_row(
            rounds.name,
            figure(rounds.spread(figures.iops), ""),
            format_latency(round(rounds.spread(figures.mean_ns).median)),
            format_latency(round(rounds.spread(figures.p99_ns).median)),
            "-" if busy is None else f"{busy:.0f} ns",
            "-" if client is None else f"{client:.0%}",
        )
    print_table(table)
    if len(measured) > 1:
        print(f"IOPS over {measured[0].name}: {ratio_text(subject.ratio(measured[0], figures.iops))}")
    if subject.name == "ringstone":
        print(f"Limit: {limited_by(subject)}.")


def _plain(rounds: Rounds) -> dict[str, Any]:
    def spread(values: Spread) -> dict[str, float]:
        return {"min": values.minimum, "median": values.median, "max": values.maximum}

    return {
        "name": rounds.name,
        "shape": rounds.shape.as_dict(),
        "iops": spread(rounds.spread(figures.iops)),
        "mean_ns": spread(rounds.spread(figures.mean_ns)),
        "p99_ns": spread(rounds.spread(figures.p99_ns)),
        "reactor_busy_ns": rounds.middle(figures.reactor_busy_ns),
        "client_busy": rounds.middle(figures.client_busy),
        "rounds": [one.raw for one in rounds.measurements],
    }


def _section_table(results: Results, section: str) -> Table:
    table = Table("what", title=section, box=None, header_style="bold", title_justify="left")
    for column in ("ringstone", "beside", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("bar")
    table.add_column("met")
    for row in results.rows:
        if row.section != section:
            continue
        beside = figure(row.reference_value, row.unit) if row.reference_value is not None else "-"
        table.add_row(
            row.what,
            figure(row.value, row.unit),
            beside,
            ratio_text(row.ratio) if row.ratio is not None else "-",
            row.bar,
            {True: "yes", False: "no", None: "-"}[row.passed],
        )
    return table
