"""`ringstone host`"""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ringstone.cli.context import JsonOption, add_row, complete_hosts, context_of, print_json, print_table

if TYPE_CHECKING:
    from ringstone.models import Host

app = typer.Typer(help="The hosts of a cluster, as a manager knows them (--manager).", no_args_is_help=True)

HostName = Annotated[
    str, typer.Argument(metavar="HOST", help="The host's name.", autocompletion=complete_hosts)
]


@app.command("list")
def list_(context: typer.Context, json_output: JsonOption = False) -> None:
    """List the hosts."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        hosts = client.hosts()
    if cli.json:
        print_json(hosts)
        return
    table = Table("host", "state", "release", "gateway", box=None, header_style="bold")
    for column in ("reactors", "free cores", "pools", "attached"):
        table.add_column(column, justify="right")
    table.add_column("trouble" if any(host.reason for host in hosts) else "")
    for host in hosts:
        add_row(
            table,
            host.name,
            "alive" if host.alive else "dead",
            host.version,
            ", ".join(host.addresses) or "-",
            str(len(host.cores)),
            str(host.free_cores),
            str(host.pools),
            str(host.attachments),
            host.reason or "",
        )
    print_table(table)


@app.command("show")
def show(context: typer.Context, name: HostName, json_output: JsonOption = False) -> None:
    """Show one host."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        host = client.host(name)
    if cli.json:
        print_json(host)
        return
    table = Table(box=None, show_header=False)
    rows = {
        "host": host.name,
        "id": host.id,
        "state": _state(host),
        "release": host.version,
        "gateway": ", ".join(host.addresses) or "not served over TCP",
        "reactors": f"CPU {', '.join(map(str, host.cores))}",
        "free cores": str(host.free_cores),
        "holds": f"{host.pools} pools of its own, {host.attachments} attached volumes",
        "seen": f"{host.seen_at.isoformat(timespec='seconds')} by its own clock",
        "made": host.created_at.isoformat(timespec="seconds"),
    }
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)


def _state(host: "Host") -> str:
    state = "alive" if host.alive else "dead"
    return state if host.reason is None else f"{state}: {host.reason}"


@app.command("remove")
def remove(context: typer.Context, name: HostName, json_output: JsonOption = False) -> None:
    """Forget a host that is dead and has no pools and no attached volumes."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        client.remove_host(name)
    if cli.json:
        print_json({"removed": name})
    else:
        print(f"Removed host {name}.")
