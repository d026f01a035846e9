"""`ringstone store`"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ringstone.cli.context import JsonOption, add_row, context_of, print_json, print_table
from ringstone.errors import FailedError
from ringstone.units import format_size

if TYPE_CHECKING:
    from ringstone.pools.store_door import Report

app = typer.Typer(help="The drives of store pools, while no gateway has them open.", no_args_is_help=True)


@app.callback()
def _store() -> None:
    """There will be more commands than one."""


@app.command("check")
def check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The block device or file.")],
    json_output: JsonOption = False,
) -> None:
    """Walk through all of a store and tell what cannot be. Nothing is changed. Exit code 11 when there are faults."""
    from ringstone.pools import store_door

    cli = context_of(context, json_output)
    report = store_door.check(str(path.absolute()))
    if cli.json:
        print_json(dataclasses.asdict(report))
    else:
        _print(report, path)
    if report.faults:
        raise typer.Exit(FailedError.exit_code)


def _print(report: "Report", path: Path) -> None:
    table = Table(box=None, show_header=False)
    rows = {
        "store": report.uuid,
        "drive": f"{path}, {format_size(report.size)} in extents of {format_size(report.extent)}",
        "used": f"{format_size(report.used)} of {format_size(report.capacity)}",
        "volumes": str(len(report.volumes)),
        "snapshots": str(sum(len(volume.snapshots) for volume in report.volumes)),
        "faults": str(len(report.faults)),
    }
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)
    for kind, lines in (("note", report.notes), ("fault", report.faults)):
        for line in lines:
            print(f"{kind}: {line}")
