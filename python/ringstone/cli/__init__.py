"""`ringstone`: the command line. A file per noun; docs/cli.md has the reference and the exit codes."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringstone import __version__
from ringstone.cli import bench, demo, gateway, guest, pool, status, top, volume
from ringstone.cli.context import CliContext, JsonOption
from ringstone.errors import RingstoneError
from ringstone.gateway.config import DEFAULT_SOCKET

app = typer.Typer(
    name="ringstone",
    help="Disks for virtual machines: pools, volumes, and the gateway that serves them over vhost-user-blk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("gateway")(gateway.gateway)
app.add_typer(pool.app, name="pool")
app.add_typer(volume.app, name="volume")
app.add_typer(bench.app, name="bench")
app.command("top")(top.top)
app.command("status")(status.status)
app.command("qemu-args")(guest.qemu_args)
app.command("libvirt-xml")(guest.libvirt_xml)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        print(f"ringstone {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    socket: Annotated[
        Path, typer.Option("--socket", envvar="RINGSTONE_SOCKET", help="The gateway's control socket.")
    ] = DEFAULT_SOCKET,
    json_output: JsonOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = CliContext(socket=socket, json=json_output)


def main() -> None:
    """The entry point: runs the command, and turns an error into one line on standard error and its exit
    code."""
    try:
        # The name also where Python runs the package: usage and completion depend on it.
        app(prog_name="ringstone")
    except RingstoneError as error:
        if "--json" in sys.argv:
            print(json.dumps({"code": error.code, "message": error.message}), file=sys.stderr)
        else:
            print(f"ringstone: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
