"""`ringstone store`"""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ringstone import models
from ringstone.cli.context import (
    CliContext,
    JsonOption,
    PoolName,
    add_row,
    context_of,
    print_json,
    print_table,
    size_argument,
)
from ringstone.cli.pool import scrub_line
from ringstone.cli.progress import bytes_done
from ringstone.errors import FailedError
from ringstone.units import format_size

if TYPE_CHECKING:
    from ringstone.pools.store_door import Report

# Between two looks at a scrub that somebody waits for.
_LOOK_SECONDS = 0.5

app = typer.Typer(
    help="The drives of store pools: whether they still hold what was written.", no_args_is_help=True
)


@app.command("check")
def check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The block device or file.")],
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what volumes hold.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended without losing anything.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Mend it without asking.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Walk through all of a store that no gateway has open, and tell what cannot be or is not what was written. Nothing
    is changed without --repair. Exit code 11 when there are faults."""
    from ringstone.pools import store_door

    cli = context_of(context, json_output)
    drive = str(path.absolute())
    if quick:
        report = store_door.check(drive)
    else:
        with bytes_done("Reading blocks") as progress:
            report = store_door.check(drive, progress=progress)
    # Where there are faults nothing is written: what is bad may be the only trace of what was there.
    mending = repair and bool(report.mendable) and not report.faults
    if not cli.json:
        _print(report, path)
    if mending:
        yes or typer.confirm("Write these copies anew?", abort=True, err=True)
        store_door.repair(drive)
    if cli.json:
        print_json({**dataclasses.asdict(report), "mended": mending})
    elif repair:
        print(_repaired(report))
    if report.faults:
        raise typer.Exit(FailedError.exit_code)


def _repaired(report: "Report") -> str:
    if report.faults:
        return (
            "Nothing was written, as there are faults that cannot be mended. If the drive fails, copy it first "
            "(ddrescue); then restore what they name from a backup."
        )
    if not report.mendable:
        return "There is nothing to mend."
    return f"{len(report.mendable)} copies were written anew."


def _print(report: "Report", path: Path) -> None:
    table = Table(box=None, show_header=False)
    blocks = report.blocks
    rows = {
        "store": report.uuid,
        "drive": f"{path}, {format_size(report.size)} in extents of {format_size(report.extent)}",
        "used": f"{format_size(report.used)} of {format_size(report.capacity)}",
        "volumes": str(len(report.volumes)),
        "snapshots": str(sum(len(volume.snapshots) for volume in report.volumes)),
        "blocks": "not read" if blocks is None else f"{blocks.read} read, {blocks.verified} verified",
        "faults": str(len(report.faults)),
    }
    if blocks is not None and blocks.bad + blocks.unreadable:
        rows["rotten"] = f"{blocks.bad} blocks bad, {blocks.unreadable} unreadable"
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)
    for kind, lines in (("note", report.notes), ("mendable", report.mendable), ("fault", report.faults)):
        for line in lines:
            print(f"{kind}: {line}")


@app.command("scrub")
def scrub(
    context: typer.Context,
    name: PoolName,
    rate: Annotated[
        int | None,
        typer.Option(
            parser=size_argument, metavar="SIZE", help="Read so much in a second at most; default 64M."
        ),
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the one that runs.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it has ended. Ctrl-C leaves it running.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Read all that a store pool has in use, while guests use it, and find what has rotted. One that runs goes on, at
    the new rate. With --wait, exit code 11 when something is bad."""
    cli = context_of(context, json_output)
    if cancel and (wait or rate is not None):
        raise typer.BadParameter("--cancel goes with neither --wait nor --rate.")
    with cli.client() as client:
        if cancel:
            client.cancel_scrub(name)
            pool = client.pool(name)
        else:
            pool = client.scrub_pool(name, rate)
    found = _awaited(cli, name, pool.scrub) if wait else pool.scrub
    if cli.json:
        print_json({"pool": name, "scrub": None if found is None else found.model_dump(mode="json")})
    elif found is None:
        print(f"Pool {name} is not being scrubbed.")
    else:
        print(f"Scrub of pool {name}: {scrub_line(found)}.")
        for fault in found.faults if wait else ():
            print(f"fault: {fault}")
    if wait and found is not None and found.bad + found.unreadable + found.mended:
        raise typer.Exit(FailedError.exit_code)


def _awaited(cli: CliContext, name: str, scrub: models.Scrub | None) -> models.Scrub:
    with bytes_done(f"Scrubbing pool {name}") as progress, cli.client() as client:
        while scrub is not None and scrub.state == "running":
            progress(scrub.done, scrub.total)
            time.sleep(_LOOK_SECONDS)
            scrub = client.pool(name).scrub
    if scrub is None:
        raise FailedError(
            f"The gateway was started anew, which ended the scrub of pool {name!r}. Begin it again."
        )
    if scrub.state != "done":
        raise FailedError(f"The scrub of pool {name!r} did not go through: {scrub_line(scrub)}.")
    return scrub
