"""`ringstone` and its global options. The commands are in lazy.py's list."""

from pathlib import Path
from typing import Annotated

import typer

from ringstone.cli.context import CliContext, JsonOption, manager_of
from ringstone.cli.lazy import LazyGroup
from ringstone.gateway.paths import DEFAULT_SOCKET

app = typer.Typer(
    name="ringstone",
    cls=LazyGroup,
    help="Disks for virtual machines: pools, volumes, and the gateway that serves them over vhost-user-blk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from ringstone.version import version

        print(f"ringstone {version()}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    socket: Annotated[
        Path, typer.Option("--socket", envvar="RINGSTONE_SOCKET", help="The gateway's control socket.")
    ] = DEFAULT_SOCKET,
    manager: Annotated[
        str | None,
        typer.Option(
            "--manager",
            envvar="RINGSTONE_MANAGER",
            metavar="URL",
            help="Talk to a manager, or to another host's gateway, such as https://10.0.0.1:7481.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file", envvar="RINGSTONE_TOKEN_FILE", help="File with the token for --manager."
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca",
            envvar="RINGSTONE_CA",
            help="Certificates (PEM) that the manager's is signed with; default the system's.",
        ),
    ] = None,
    json_output: JsonOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = CliContext(
        socket=socket,
        json=json_output,
        manager=manager_of(context),
        token_file=token_file,
        ca=ca,
    )
