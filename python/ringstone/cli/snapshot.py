"""`ringstone snapshot`"""

from typing import Annotated

import typer
from rich.table import Table

from ringstone.cli.context import (
    JsonOption,
    VolumeName,
    add_row,
    complete_volumes,
    context_of,
    print_json,
    print_table,
)
from ringstone.units import format_size

app = typer.Typer(
    help="Snapshots of volumes in pools that have them (store, rbd), and clones of those.",
    no_args_is_help=True,
)

SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The snapshot's name.")]


@app.command("create")
def create(
    context: typer.Context,
    volume: VolumeName,
    name: SnapshotName,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VOLUME",
            help="Store pool: another volume that gets one of that name at the same point; may be repeated.",
            autocompletion=complete_volumes,
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Make a snapshot; a running guest may write on."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        snapshot = client.create_snapshot(volume, name, also=also or [])
    if cli.json:
        print_json(snapshot)
    else:
        of = f"volumes {', '.join((volume, *also))}" if also else f"volume {volume}"
        print(f"Made snapshot {name} of {of}.")


@app.command("list")
def list_(context: typer.Context, volume: VolumeName, json_output: JsonOption = False) -> None:
    """List a volume's snapshots, oldest first."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        snapshots = client.snapshots(volume)
    if cli.json:
        print_json(snapshots)
        return
    table = Table("snapshot", box=None, header_style="bold")
    table.add_column("size", justify="right")
    table.add_column("own", justify="right")
    table.add_column("made")
    for snapshot in snapshots:
        add_row(
            table,
            snapshot.name,
            format_size(snapshot.size),
            "-" if snapshot.own is None else format_size(snapshot.own),
            snapshot.created_at.isoformat(timespec="seconds"),
        )
    print_table(table)


@app.command("delete")
def delete(
    context: typer.Context, volume: VolumeName, name: SnapshotName, json_output: JsonOption = False
) -> None:
    """Delete a snapshot that has no clones. In a store pool its blocks are freed in the background."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.delete_snapshot(volume, name)
    if cli.json:
        print_json({"deleted": f"{volume}@{name}"})
    else:
        print(f"Deleted snapshot {name} of volume {volume}.")


@app.command("deletions")
def deletions(context: typer.Context, volume: VolumeName, json_output: JsonOption = False) -> None:
    """Show how far the deletion of a volume's snapshots is, in a store pool."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        found = client.deletions(volume)
    if cli.json:
        print_json(found)
        return
    table = Table("snapshot", box=None, header_style="bold")
    for column in ("had", "left", "done"):
        table.add_column(column, justify="right")
    for one in found:
        done = 100 * (one.total - one.left) // one.total if one.total else 0
        add_row(table, one.snapshot, format_size(one.total), format_size(one.left), f"{done} %")
    print_table(table)


@app.command("keep")
def keep(
    context: typer.Context, volume: VolumeName, name: SnapshotName, json_output: JsonOption = False
) -> None:
    """Take back the deletion of a snapshot in a store pool, as long as nothing of it is freed."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        snapshot = client.keep_snapshot(volume, name)
    if cli.json:
        print_json(snapshot)
    else:
        print(f"Kept snapshot {name} of volume {volume}.")


@app.command("reclaimable")
def reclaimable(context: typer.Context, volume: VolumeName, json_output: JsonOption = False) -> None:
    """Show what deleting each snapshot of a volume, alone, would free, in a store pool."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        found = client.reclaimable(volume)
    if cli.json:
        print_json(found)
        return
    table = Table("snapshot", box=None, header_style="bold")
    table.add_column("reclaimable", justify="right")
    for one in found:
        add_row(table, one.snapshot, "has clones" if one.size is None else format_size(one.size))
    print_table(table)


@app.command("revert")
def revert(
    context: typer.Context, volume: VolumeName, name: SnapshotName, json_output: JsonOption = False
) -> None:
    """Give a detached volume the snapshot's content. What was written since is gone for good."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.revert(volume, name)
    if cli.json:
        print_json({"volume": volume, "reverted_to": name})
    else:
        print(f"Volume {volume} has the content of snapshot {name}.")


@app.command("clone")
def clone(
    context: typer.Context,
    volume: VolumeName,
    name: SnapshotName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="A name for the new volume.")],
    json_output: JsonOption = False,
) -> None:
    """Make a volume of a snapshot. It is there at once and shares blocks with it until they are written."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        made = client.clone_snapshot(volume, name, new)
    if cli.json:
        print_json(made)
    else:
        print(f"Made volume {made.name}, {format_size(made.size)}, of {volume}@{name}.")


@app.command("diff")
def diff(
    context: typer.Context,
    volume: VolumeName,
    since: Annotated[
        str | None, typer.Option("--from", metavar="SNAPSHOT", help="Default: from nothing, all there is.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", metavar="SNAPSHOT", help="Default: what the volume holds now.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Show where a volume in a store pool has changed: a line of offset and length in bytes for each range."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        found = client.diff(volume, since=since, until=until)
    if cli.json:
        print_json(found)
        return
    for offset, length in found.ranges:
        print(f"{offset} {length}")


@app.command("flatten")
def flatten(context: typer.Context, volume: VolumeName, json_output: JsonOption = False) -> None:
    """Copy what a clone still shares with its parent, so that it stands alone."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.flatten(volume)
    if cli.json:
        print_json({"flattened": volume})
    else:
        print(f"Volume {volume} has no parent any more.")
