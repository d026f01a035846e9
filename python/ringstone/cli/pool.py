"""`ringstone pool`"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ringstone import models
from ringstone.cli.context import (
    JsonOption,
    PoolName,
    add_row,
    complete_hosts,
    context_of,
    print_json,
    print_table,
    size_argument,
)
from ringstone.units import format_size

app = typer.Typer(
    help="Where volumes' blocks are kept: memory, a directory, a block device, a store, a Ceph cluster.",
    no_args_is_help=True,
)


class PoolType(StrEnum):
    MEMORY = "memory"
    FILE = "file"
    STORE = "store"
    RBD = "rbd"
    NULL = "null"


class Direct(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Store pool: the file with its key, which encrypted volumes need; 32 bytes or 64 hexadecimal digits.",
    ),
]
KeyCommand = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Store pool: a program in /etc/ringstone/key-commands that prints its key."
    ),
]
KeyCredential = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Store pool: a credential of the gateway's unit that has its key."),
]


@app.command("create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="POOL", help="A name for the pool.")],
    kind: Annotated[
        PoolType,
        typer.Option(
            "--type",
            help=(
                "memory: gone with the host; file: a directory or block device; store: a block device or file for "
                "many volumes, with snapshots; rbd: a pool of a Ceph cluster; null: keeps nothing."
            ),
        ),
    ],
    path: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Directory, block device or, for a store, file; default /dev/shm/ringstone-POOL for memory, <state "
                "dir>/pools/POOL for file, <state dir>/pools/POOL.store for a store."
            )
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            parser=size_argument,
            metavar="SIZE",
            help="The most that the volumes' sizes may add up to, such as 100G.",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            parser=size_argument,
            metavar="SIZE",
            help="Store pool: the size of its file, which is made; a device has its own.",
        ),
    ] = None,
    extent: Annotated[
        int | None,
        typer.Option(
            parser=size_argument,
            metavar="SIZE",
            help="Store pool: the unit in which blocks have a place, 16K to 1M; default 64K.",
        ),
    ] = None,
    overcommit: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Store pool: how many times its capacity the volumes' sizes may add up to; default 10.",
        ),
    ] = None,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
    key_credential: KeyCredential = None,
    hugepages: Annotated[
        bool, typer.Option("--hugepages", help="Memory pool: keep it in huge pages (hugetlbfs).")
    ] = False,
    direct: Annotated[
        Direct, typer.Option(help="File pool: bypass the page cache; auto does where the filesystem can.")
    ] = Direct.AUTO,
    ceph_pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Rbd pool: its name in Ceph; default POOL.")
    ] = None,
    conf: Annotated[
        Path | None, typer.Option(help="Rbd pool: the cluster's ceph.conf; default /etc/ceph/ceph.conf.")
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="client.NAME", help="Rbd pool: Ceph's user; default client.admin.")
    ] = None,
    keyring: Annotated[
        Path | None, typer.Option(help="Rbd pool: the file with the user's key; default as ceph.conf says.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="With --manager: the host of a pool that only one reaches.", autocompletion=complete_hosts
        ),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Rbd pool: a namespace in Ceph's pool.")] = None,
    data_pool: Annotated[
        str | None,
        typer.Option(help="Rbd pool: another of Ceph's pools for the data, erasure-coded perhaps."),
    ] = None,
    erase: Annotated[
        bool,
        typer.Option(
            "--yes", help="On a block device or a store's file: it may hold something, which is to be lost."
        ),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Make a pool."""
    cli = context_of(context, json_output)
    mode: Literal["auto", "on", "off"] = direct.value
    given = {
        "ceph_pool": ceph_pool,
        "conf": str(conf.absolute()) if conf else None,
        "user": user,
        "keyring": str(keyring.absolute()) if keyring else None,
        "namespace": namespace,
        "data_pool": data_pool,
    }
    given = {option: value for option, value in given.items() if value is not None}
    keys = _key_options(key_file, key_command, key_credential)
    chosen = {"size": size, "extent": extent, "overcommit": overcommit, **keys}
    chosen = {option: value for option, value in chosen.items() if value is not None}
    request = models.PoolCreate(
        name=name,
        type=kind.value,
        host=host,
        path=str(path.absolute()) if path else None,
        capacity=capacity,
        hugepages=hugepages,
        direct=mode,
        rbd=models.RbdOptions.model_validate(given) if given else None,
        store=models.StoreOptions.model_validate(chosen) if chosen else None,
        erase=erase,
    )
    with cli.client() as client:
        pool = client.create_pool(request)
    if cli.json:
        print_json(pool)
    else:
        where = f" {'on' if pool.space else 'in'} {pool.path}" if pool.path else ""
        room = f", with room for {format_size(pool.space.capacity)}" if pool.space else ""
        print(f"Made {pool.type} pool {pool.name}{where}{room}.")


@app.command("list")
def list_(context: typer.Context, json_output: JsonOption = False) -> None:
    """List the pools."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        pools = client.pools()
    if cli.json:
        print_json(pools)
        return
    table = Table("pool", "type", "path", box=None, header_style="bold")
    for column in ("volumes", "provisioned", "capacity", "free"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for pool in pools:
        add_row(
            table,
            pool.name,
            pool.type,
            pool.path or "-",
            str(pool.volumes),
            format_size(pool.provisioned),
            _size(pool.capacity),
            _size(pool.free),
            pool.state,
        )
    print_table(table)


@app.command("show")
def show(context: typer.Context, name: PoolName, json_output: JsonOption = False) -> None:
    """Show one pool."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        pool = client.pool(name)
    if cli.json:
        print_json(pool)
        return
    table = Table(box=None, show_header=False)
    rows = {
        "pool": pool.name,
        "type": pool.type,
        "host": pool.host or "all",
        "path": pool.path or "-",
        "state": pool.state if pool.reason is None else f"{pool.state}: {pool.reason}",
        "volumes": str(pool.volumes),
        "provisioned": format_size(pool.provisioned),
        "capacity": _size(pool.capacity),
        "medium": f"{_size(pool.free)} free of {_size(pool.total)}",
        **_space_rows(pool),
        **({} if pool.key is None else {"key": pool.key}),
        **({} if pool.scrub is None else {"scrub": scrub_line(pool.scrub)}),
        "made": pool.created_at.isoformat(timespec="seconds"),
    }
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)


def _space_rows(pool: models.Pool) -> dict[str, str]:
    space = pool.space
    if space is None:
        return {}
    share = f" ({100 * space.used / space.capacity:.1f} %)" if space.capacity else ""
    return {
        "drive": format_size(space.size),
        "for blocks": format_size(space.capacity),
        "used": f"{format_size(space.used)}{share}",
        "free": format_size(space.free),
        "reclaiming": format_size(space.reclaiming),
        "promised": f"{format_size(space.promised)}, at most {format_size(space.promised_at_most)}",
    }


def scrub_line(scrub: models.Scrub) -> str:
    """How far it is, or how it ended."""
    found = f"{scrub.bad} bad, {scrub.unreadable} unreadable, {scrub.mended} mended"
    if scrub.state == "running":
        share = 100 * scrub.done / scrub.total if scrub.total else 0.0
        return (
            f"running: {min(share, 100):.1f} % of {format_size(scrub.total)}, at most {format_size(scrub.rate)} a "
            f"second; {found}"
        )
    ended = scrub.ended_at.isoformat(timespec="seconds") if scrub.ended_at else "-"
    return f"{scrub.state} {ended}: {scrub.blocks} blocks read, {scrub.verified} verified; {found}"


@app.command("grow")
def grow(
    context: typer.Context,
    name: PoolName,
    size: Annotated[
        int | None,
        typer.Option(
            parser=size_argument,
            metavar="SIZE",
            help="The size that the pool's file is to have; not of devices.",
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Use all of a store pool's drive after it has become larger. Volumes are served meanwhile."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        pool = client.grow_pool(name, size)
    if cli.json:
        print_json(pool)
    else:
        room = f" and has room for {format_size(pool.space.capacity)}" if pool.space else ""
        print(f"Pool {name} uses all of {pool.path}{room}.")


@app.command("rekey")
def rekey(
    context: typer.Context,
    name: PoolName,
    key_file: KeyFile = None,
    key_command: KeyCommand = None,
    key_credential: KeyCredential = None,
    json_output: JsonOption = False,
) -> None:
    """Give a store pool another key, or its first. Encrypted volumes stay as they are and are served meanwhile; only
    their own keys are wrapped anew."""
    cli = context_of(context, json_output)
    key = models.PoolRekey.model_validate(_key_options(key_file, key_command, key_credential))
    with cli.client() as client:
        pool = client.rekey_pool(name, key)
    if cli.json:
        print_json(pool)
    else:
        print(
            f"The key of pool {name} is {pool.key} now. Keep the one before while there are copies of the drive."
        )


@app.command("delete")
def delete(context: typer.Context, name: PoolName, json_output: JsonOption = False) -> None:
    """Delete a pool that has no volumes."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.delete_pool(name)
    if cli.json:
        print_json({"deleted": name})
    else:
        print(f"Deleted pool {name}.")


def _key_options(file: Path | None, command: str | None, credential: str | None) -> dict[str, str]:
    given = {
        "key_file": str(file.absolute()) if file else None,
        "key_command": command,
        "key_credential": credential,
    }
    return {option: value for option, value in given.items() if value is not None}


def _size(size: int | None) -> str:
    return "-" if size is None else format_size(size)
