"""What every command shares: the gateway to talk to, how to print, and options that several have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringstone.errors import RingstoneError
from ringstone.gateway.paths import DEFAULT_SOCKET
from ringstone.units import parse_size

# Every command reads this file, `ringstone gateway` too: what only others need is imported where it is used.
if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType
    from rich.table import Table

    from ringstone.client import GatewayClient

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; errors too.")]

# Completion must not keep a person waiting.
_COMPLETION_SECONDS = 1.0


@dataclass(slots=True)
class CliContext:
    """The global options."""

    socket: Path
    json: bool

    def client(self) -> "GatewayClient":
        from ringstone.client import GatewayClient

        return GatewayClient(self.socket)


def context_of(context: typer.Context, json_output: bool) -> CliContext:
    """The global options, with --json also where it was given to the command."""
    found = context.find_object(CliContext)
    assert found is not None, "the root callback sets it"
    return CliContext(found.socket, found.json or json_output)


def print_json(value: "BaseModel | Sequence[BaseModel] | dict[str, Any]", *, compact: bool = False) -> None:
    """On standard output; `compact` is one line."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        plain: Any = value.model_dump(mode="json")
    elif isinstance(value, dict):
        plain = value
    else:
        plain = [item.model_dump(mode="json") for item in value]
    print(json.dumps(plain, indent=None if compact else 2), flush=True)


def print_table(table: "RenderableType") -> None:
    """To a terminal in its width; to a file or pipe as wide as it takes, so that nothing is cut off."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    console.print(table)


def add_row(table: "Table", *cells: str) -> None:
    """Add `cells` as they are: a path may hold what Rich would take for markup."""
    from rich.text import Text

    table.add_row(*(Text(cell) for cell in cells))


def size_argument(text: str | int) -> int:
    """Parser of sizes for typer: bytes or a binary unit. Typer also passes defaults through it."""
    if isinstance(text, int):
        return text
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def complete_volumes(context: typer.Context, incomplete: str) -> list[str]:
    """Names of volumes, from the gateway."""
    return _complete(context, incomplete, lambda client: [volume.name for volume in client.volumes()])


def complete_pools(context: typer.Context, incomplete: str) -> list[str]:
    """Names of pools, from the gateway."""
    return _complete(context, incomplete, lambda client: [pool.name for pool in client.pools()])


def _complete(context: typer.Context, incomplete: str, ask: Any) -> list[str]:
    from ringstone.client import GatewayClient

    socket = context.find_root().params.get("socket") or DEFAULT_SOCKET
    try:
        with GatewayClient(Path(socket), timeout=_COMPLETION_SECONDS) as client:
            return [name for name in ask(client) if name.startswith(incomplete)]
    except RingstoneError:
        # A person who presses Tab wants names or nothing; the command itself tells what is wrong.
        return []


VolumeName = Annotated[
    str, typer.Argument(metavar="VOLUME", help="The volume's name.", autocompletion=complete_volumes)
]
PoolName = Annotated[
    str, typer.Argument(metavar="POOL", help="The pool's name.", autocompletion=complete_pools)
]
