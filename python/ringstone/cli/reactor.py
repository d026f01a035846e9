"""`ringstone reactor`: the polling threads, and which queue is where."""

from typing import Annotated

import typer
from rich.table import Table

from ringstone.cli.context import JsonOption, VolumeName, add_row, context_of, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="The gateway's polling threads, one per CPU.")

Core = Annotated[int, typer.Argument(metavar="CPU", min=0, help="The reactor's CPU.")]


@app.command("list")
def list_reactors(context: typer.Context, json_output: JsonOption = False) -> None:
    """Show the reactors and the queues they have."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        reactors, attachments = client.reactors(), client.attachments()
    if cli.json:
        print_json(reactors)
        return
    table = Table("CPU", "QUEUES", box=None)
    for reactor in reactors:
        queues = [
            f"{attachment.volume}:{queue.index}"
            for attachment in attachments
            for queue in attachment.queue_states
            if queue.running and queue.reactor == reactor.index
        ]
        add_row(table, str(reactor.core), " ".join(queues) or "-")
    print_table(table)


@app.command("add")
def add(context: typer.Context, core: Core, json_output: JsonOption = False) -> None:
    """Start a reactor on a CPU, until the gateway ends. Queues move there as load makes it worth it."""
    cli = context_of(context, json_output)
    with cli.client() as client:
        reactor = client.add_reactor(core)
    if cli.json:
        print_json(reactor)


@app.command("remove")
def remove(context: typer.Context, core: Core) -> None:
    """Move a reactor's queues to the others and end it."""
    with context_of(context, False).client() as client:
        client.remove_reactor(core)


@app.command("move")
def move(
    context: typer.Context,
    volume: VolumeName,
    queue: Annotated[int, typer.Argument(min=0, help="The queue's number.")],
    core: Core,
) -> None:
    """Move a running queue to the reactor on a CPU. It arrives when its requests in flight are done."""
    with context_of(context, False).client() as client:
        client.move_queue(volume, queue, core)
