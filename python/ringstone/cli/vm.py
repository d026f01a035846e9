"""`ringstone vm`"""

from pathlib import Path
from typing import Annotated

import typer

from ringstone.cli.context import JsonOption, complete_hosts, complete_volumes, context_of, print_json
from ringstone.errors import UnreachableError
from ringstone.hypervisor.disks import Disks, MovedDisks, SharedDisks
from ringstone.hypervisor.migration import migrate_vm
from ringstone.hypervisor.qmp import QmpSession

app = typer.Typer(help="Virtual machines whose disks are volumes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `migrate` a subcommand while it is the only one."""


def _open(path: Path, whose: str) -> QmpSession:
    try:
        return QmpSession.open(path)
    except (OSError, EOFError, TimeoutError) as error:
        raise UnreachableError(
            f"No QEMU answers at {path} ({error}); start the {whose} with -qmp unix:{path},server=on,wait=off."
        ) from error


@app.command("migrate")
def migrate(
    context: typer.Context,
    source: Annotated[Path, typer.Option("--source-qmp", help="QMP socket of the QEMU that runs the guest.")],
    destination: Annotated[
        Path, typer.Option("--destination-qmp", help="QMP socket of the QEMU started with -incoming defer.")
    ],
    uri: Annotated[str, typer.Option(help="Where the two meet, such as unix:/run/move.sock.")],
    volumes: Annotated[
        list[str],
        typer.Option("--volume", help="A disk of the guest; once for each.", autocompletion=complete_volumes),
    ],
    to_host: Annotated[
        str | None,
        typer.Option(
            "--to-host",
            help="With --manager: the host of the destination's QEMU, when it is another one.",
            autocompletion=complete_hosts,
        ),
    ] = None,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Leave the source's QEMU paused instead of ending it.")
    ] = False,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds until it is given up.")] = 600,
    json_output: JsonOption = False,
) -> None:
    """Move a running guest to another QEMU, on the same host or another, with its volumes. What fails is rolled back,
    and told."""
    cli = context_of(context, json_output)
    with cli.client() as client, _open(source, "source") as qmp:
        disks: Disks = MovedDisks(client, volumes, to_host) if to_host else SharedDisks(client, volumes)
        left = migrate_vm(
            disks,
            source=qmp,
            open_destination=lambda: _open(destination, "destination"),
            uri=uri,
            keep_source=keep_source,
            timeout_s=timeout,
            report=(lambda _: None) if cli.json else print,
        )
    if cli.json:
        print_json({"migrated": volumes, "left": left})
    for sentence in left if not cli.json else []:
        print(f"Left to do: {sentence}.")
