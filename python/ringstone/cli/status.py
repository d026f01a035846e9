"""`ringstone status`"""

from typing import Annotated

import typer
from rich.table import Table

from ringstone.cli.context import JsonOption, add_row, context_of, print_json, print_table


def status(
    context: typer.Context,
    events: Annotated[int, typer.Option(min=0, max=1000, help="Also show so many of the latest events.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Show how the gateway is doing. Exit code 0 whatever the health; it is in the answer."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        info, health = client.info(), client.health()
        latest = client.events(limit=events) if events else []
    if cli.json:
        print_json(
            {
                "gateway": info.model_dump(mode="json"),
                "health": health.model_dump(mode="json"),
                "events": [event.model_dump(mode="json") for event in latest],
            }
        )
        return
    table = Table(box=None, show_header=False)
    rows = {
        "gateway": (
            f"Ringstone {info.version}, process {info.pid}, since "
            f"{info.started_at.isoformat(timespec='seconds')}"
        ),
        "health": "\n".join([health.status, *health.reasons]),
        "reactors": f"CPU {', '.join(map(str, info.cores))}; asleep after {info.idle_us} us without work",
        "holds": f"{info.pools} pools, {info.volumes} volumes, {info.attachments} of them attached",
        "socket": info.socket,
        "state": info.state_dir,
        "stats page": info.stats_path,
    }
    for label, value in rows.items():
        add_row(table, label, value)
    print_table(table)
    for event in latest:
        about = f"{event.volume}: " if event.volume else ""
        print(f"{event.at.isoformat(timespec='seconds')} {event.level:7} {about}{event.message}")
