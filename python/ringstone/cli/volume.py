"""`ringstone volume`"""

from pathlib import Path
from typing import Annotated

import typer

from ringstone import models
from ringstone.cli.context import (
    IntervalOption,
    JsonOption,
    VolumeName,
    add_row,
    complete_hosts,
    complete_pools,
    context_of,
    print_json,
    print_table,
    size_argument,
)
from ringstone.units import format_size

app = typer.Typer(help="Disks: make, grow, attach and watch them.", no_args_is_help=True)


@app.command("stats")
def stats(
    context: typer.Context,
    name: VolumeName,
    watching: Annotated[bool, typer.Option("--watch", help="Show rates anew at each interval.")] = False,
    interval: IntervalOption = 1.0,
    count: Annotated[
        int | None, typer.Option(min=1, help="With --watch: stop after so many intervals.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Show what a volume has done since it was attached, or with --watch what it does now.

    With --json --watch each interval is one line.
    """
    from ringstone.cli.volume_stats import show_stats

    show_stats(context_of(context, json_output), name, interval if watching else None, count)


@app.command("create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="VOLUME", help="A name for the volume.")],
    pool: Annotated[str, typer.Option(help="The pool to make it in.", autocompletion=complete_pools)],
    size: Annotated[
        int | None,
        typer.Option(
            parser=size_argument,
            metavar="SIZE",
            help="Bytes or a binary unit, such as 10G; only a block device has a size of its own.",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Logical block size, 512 or 4096.")] = 512,
    integrity: Annotated[
        bool, typer.Option("--integrity", help="Keep a checksum of each block; in a store pool.")
    ] = False,
    encryption: Annotated[
        bool, typer.Option("--encryption", help="Encrypt each block; in a store pool that has a key.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Make a volume. It reads as zeroes, except on a block device, whose content stays."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        volume = client.create_volume(
            name, pool=pool, size=size, block_size=block_size, integrity=integrity, encryption=encryption
        )
    if cli.json:
        print_json(volume)
    else:
        print(f"Made volume {volume.name}, {format_size(volume.size)}, in pool {volume.pool}.")


@app.command("list")
def list_(
    context: typer.Context,
    pool: Annotated[
        str | None, typer.Option(help="Only those of this pool.", autocompletion=complete_pools)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """List the volumes."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        volumes = client.volumes(pool=pool)
    if cli.json:
        print_json(volumes)
        return
    from ringstone.cli.volume_table import volume_table

    print_table(volume_table(volume.model_dump() for volume in volumes))


@app.command("show")
def show(context: typer.Context, name: VolumeName, json_output: JsonOption = False) -> None:
    """Show one volume."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        volume = client.volume(name)
    if cli.json:
        print_json(volume)
        return
    from rich.table import Table

    table = Table(box=None, show_header=False)
    rows = {
        "volume": volume.name,
        "id": volume.id,
        "serial": volume.serial,
        "pool": volume.pool,
        "size": f"{format_size(volume.size)} ({volume.size} bytes)",
        "allocated": "-" if volume.allocated is None else format_size(volume.allocated),
        **({} if volume.shared is None else {"shared": format_size(volume.shared)}),
        "block size": str(volume.block_size),
        **({} if volume.integrity is None else {"checksums": "yes" if volume.integrity else "no"}),
        **({} if volume.encryption is None else {"encrypted": "yes" if volume.encryption else "no"}),
        "state": volume.state if volume.reason is None else f"{volume.state}: {volume.reason}",
        "made": volume.created_at.isoformat(timespec="seconds"),
        **_attachment_rows(volume),
    }
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)


def _attachment_rows(volume: models.Volume) -> dict[str, str]:
    attachment = volume.attachment
    if attachment is None:
        return {"attached": "no"}
    running = [queue for queue in attachment.queue_states if queue.running]
    reactors = sorted({queue.reactor for queue in running if queue.reactor is not None})
    rights = attachment.socket_rights
    rows = {
        "attached": attachment.state
        if attachment.reason is None
        else f"{attachment.state}: {attachment.reason}",
        "host": f"{attachment.host}, in epoch {attachment.epoch}{', ha' if attachment.ha else ''}",
        "socket": f"{attachment.socket}{f', {rights}' if rights else ''}",
        "queues": f"{len(running)} running of {attachment.queues}",
        "read-only": "yes" if attachment.read_only else "no",
        "served": volume.detail or "-",
    }
    if running:
        rows["rings"] = "packed" if attachment.packed else "split"
        rows["reactors"] = ", ".join(map(str, reactors))
    if attachment.peer_pid is not None:
        rows["frontend"] = f"process {attachment.peer_pid}"
        rows["guest memory"] = (
            f"{format_size(attachment.memory_bytes)} in {attachment.memory_regions} regions"
        )
    return rows


@app.command("clone")
def clone(
    context: typer.Context,
    name: VolumeName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="A name for the new volume.")],
    json_output: JsonOption = False,
) -> None:
    """Make a volume of what another one in a store pool holds now, in use or not. They share blocks until they are
    written; `ringstone snapshot clone` does it of a snapshot."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        volume = client.clone_volume(name, new)
    if cli.json:
        print_json(volume)
    else:
        print(f"Made volume {volume.name}, {format_size(volume.size)}, of {name}.")


@app.command("resize")
def resize(
    context: typer.Context,
    name: VolumeName,
    size: Annotated[
        int, typer.Argument(parser=size_argument, metavar="SIZE", help="The new size, such as 20G.")
    ],
    json_output: JsonOption = False,
) -> None:
    """Grow a volume. A running guest sees the new size at once; its filesystem is grown from within."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        volume = client.resize_volume(name, size)
    if cli.json:
        print_json(volume)
    else:
        print(f"Volume {volume.name} now has {format_size(volume.size)}.")


@app.command("delete")
def delete(context: typer.Context, name: VolumeName, json_output: JsonOption = False) -> None:
    """Delete a volume that is not attached. Its content is gone for good, except on a block device."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.delete_volume(name)
    if cli.json:
        print_json({"deleted": name})
    else:
        print(f"Deleted volume {name}.")


@app.command("attach")
def attach(
    context: typer.Context,
    name: VolumeName,
    at: Annotated[
        Path | None, typer.Option(help="Socket to listen on; default <run dir>/vhost/VOLUME.sock.")
    ] = None,
    queues: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=models.MAX_QUEUES,
            help="The most queues for the guest; default one per reactor, at most 4.",
        ),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The guest may not write.")] = False,
    ha: Annotated[
        bool, typer.Option("--ha", help="Another host may take the volume over when this one is dead.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Also from a host that has it attached, which is shut out first."),
    ] = False,
    incoming: Annotated[
        bool,
        typer.Option("--incoming", help="Only listen, for a guest that is to move here from another host."),
    ] = False,
    socket_owner: Annotated[
        str | None,
        typer.Option(help="User (or number) that the socket belongs to, such as libvirt-qemu."),
    ] = None,
    socket_group: Annotated[str | None, typer.Option(help="Group of the socket.")] = None,
    socket_mode: Annotated[
        str | None, typer.Option(help="Its mode; default 0600, or 0660 with a group.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="With --manager: where; default its pool's host, or the one with most free cores.",
            autocompletion=complete_hosts,
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Serve a volume on a vhost-user socket, also after a restart, until it is detached."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        attachment = client.attach(
            name,
            socket=str(at.absolute()) if at else None,
            queues=queues,
            read_only=read_only,
            ha=ha,
            take_over=take_over,
            incoming=incoming,
            host=host,
            socket_owner=socket_owner,
            socket_group=socket_group,
            socket_mode=socket_mode,
        )
    if cli.json:
        print_json(attachment)
    else:
        where = f" of host {attachment.host}" if cli.manager else ""
        if incoming:
            print(f"Volume {name} waits for its guest at {attachment.socket}{where}.")
            return
        print(
            f"Volume {name} is served at {attachment.socket}{where}; `ringstone qemu-args {name}` shows how to use "
            "it."
        )


@app.command("share")
def share(
    context: typer.Context,
    name: VolumeName,
    off: Annotated[bool, typer.Option("--off", help="For one frontend again.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Let a second frontend connect, for a live migration by other tools than `ringstone vm migrate`."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        attachment = client.share(name, not off)
    if cli.json:
        print_json(attachment)
    else:
        print(f"Volume {name} takes {'one frontend' if off else 'a second frontend'}.")


@app.command("detach")
def detach(
    context: typer.Context,
    name: VolumeName,
    force: Annotated[
        bool, typer.Option("--force", help="Also while a guest uses it: its requests fail from then on.")
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(
            help="With --manager: where it waits for its guest; default where it is attached.",
            autocompletion=complete_hosts,
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Stop serving a volume, or waiting for its guest."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.detach(name, force=force, host=host)
    if cli.json:
        print_json({"detached": name})
    else:
        print(f"Volume {name} is no longer attached.")
