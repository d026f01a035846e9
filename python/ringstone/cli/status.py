"""`ringstone status`"""

from typing import Annotated

import typer
from rich.table import Table

from ringstone import models
from ringstone.cli.context import JsonOption, add_row, context_of, print_json, print_table
from ringstone.client import ApiClient
from ringstone.errors import NotFoundError


def status(
    context: typer.Context,
    events: Annotated[int, typer.Option(min=0, max=1000, help="Also show so many of the latest events.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Show how the gateway is doing. Exit code 0 whatever the health; it is in the answer."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        info: models.GatewayInfo | models.ManagerInfo = _info(client) if cli.manager else client.info()
        health = client.health()
        latest = client.events(limit=events) if events else []
    is_manager = isinstance(info, models.ManagerInfo)
    if cli.json:
        print_json(
            {
                "manager" if is_manager else "gateway": info.model_dump(mode="json"),
                "health": health.model_dump(mode="json"),
                "events": [event.model_dump(mode="json") for event in latest],
            }
        )
        return
    table = Table(box=None, show_header=False)
    of_it = _manager_rows(info) if isinstance(info, models.ManagerInfo) else _gateway_rows(info)
    process = (
        f"Ringstone {info.version}, process {info.pid}, since {info.started_at.isoformat(timespec='seconds')}"
    )
    rows = {
        "manager" if is_manager else "gateway": process,
        "health": "\n".join([health.status, *health.reasons]),
        **of_it,
    }
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)
    for event in latest:
        about = f"{event.volume}: " if event.volume else ""
        print(f"{event.at.isoformat(timespec='seconds')} {event.level:7} {about}{event.message}")


def _info(client: ApiClient) -> models.GatewayInfo | models.ManagerInfo:
    """--manager may name a gateway too."""
    try:
        return client.manager()
    except NotFoundError:
        return client.info()


def _manager_rows(info: models.ManagerInfo) -> dict[str, str]:
    grace = info.failover_grace_s
    return {
        "url": info.url,
        "state": f"etcd at {info.state}",
        "hosts": f"{info.hosts}, {info.hosts_alive} of them alive",
        "holds": f"{info.pools} pools, {info.volumes} volumes, {info.attachments} of them attached",
        "failover": "off" if grace is None else f"of a host that has been dead for {grace:g} s",
    }


def _gateway_rows(info: models.GatewayInfo) -> dict[str, str]:
    return {
        "reactors": f"CPU {', '.join(map(str, info.cores))}; asleep after {info.idle_us} us without work",
        "holds": "not known now, see its health"
        if info.pools is None
        else f"{info.pools} pools, {info.volumes} volumes, {info.attachments} of them attached",
        "socket": info.socket,
        "state": info.state_dir,
        "stats page": info.stats_path,
    }
