"""What every command shares: the gateway to talk to, how to print, and options that several have."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringstone.cli.tables import add_row as add_row
from ringstone.cli.tables import print_table as print_table
from ringstone.errors import RingstoneError
from ringstone.gateway.paths import DEFAULT_SOCKET
from ringstone.units import parse_size

# Every command reads this file, `ringstone gateway` too: what only others need is imported where it is used.
if TYPE_CHECKING:
    from pydantic import BaseModel

    from ringstone.client import ApiClient

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; errors too.")]
IntervalOption = Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two readings.")]

# Completion must not keep a person waiting.
_COMPLETION_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_MANAGER_SECONDS = 130.0


@dataclass(slots=True)
class CliContext:
    """The global options. `manager` is a URL; None: the gateway of this host, at `socket`."""

    socket: Path
    json: bool
    manager: str | None = None
    token_file: Path | None = None
    ca: Path | None = None

    def client(self, timeout: float | None = None) -> "ApiClient":
        """Of the manager, or else of this host's gateway."""
        from ringstone.client import DEFAULT_TIMEOUT, GatewayClient, RemoteClient

        seconds = timeout or DEFAULT_TIMEOUT
        if self.manager is None:
            return GatewayClient(self.socket, timeout=seconds)
        return RemoteClient(
            self.manager,
            token=self._token(),
            ca=self.ca,
            # Longer than a manager waits for a gateway, whose answer is worth more than ours.
            timeout=timeout or _MANAGER_SECONDS,
            connect_timeout=min(seconds, _CONNECT_SECONDS),
        )

    def _token(self) -> str:
        if self.token_file is not None:
            from ringstone.listening import read_tokens

            return read_tokens(self.token_file)[0]
        return os.environ.get("RINGSTONE_TOKEN", "").strip()


def manager_of(context: typer.Context) -> str | None:
    """The URL that a person gave; --socket on the command line counts more than the environment's."""
    manager, given = context.params.get("manager"), context.get_parameter_source("manager")
    socket = context.get_parameter_source("socket")
    if manager is None or socket is None or socket.name != "COMMANDLINE":
        return manager or None
    if given is not None and given.name == "COMMANDLINE":
        raise typer.BadParameter("Give --manager or --socket, not both.")
    return None


def context_of(context: typer.Context, json_output: bool) -> CliContext:
    """The global options, with --json also where it was given to the command."""
    found = context.find_object(CliContext)
    assert found is not None, "the root callback sets it"
    return replace(found, json=found.json or json_output)


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


def complete_hosts(context: typer.Context, incomplete: str) -> list[str]:
    """Names of hosts, from the manager."""
    return _complete(context, incomplete, lambda client: [host.name for host in client.hosts()])


def complete_pools(context: typer.Context, incomplete: str) -> list[str]:
    """Names of pools, from the gateway."""
    return _complete(context, incomplete, lambda client: [pool.name for pool in client.pools()])


def _complete(context: typer.Context, incomplete: str, ask: Any) -> list[str]:
    given = context.find_root().params
    token_file, ca = given.get("token_file"), given.get("ca")
    cli = CliContext(
        socket=Path(given.get("socket") or DEFAULT_SOCKET),
        json=False,
        manager=given.get("manager"),
        token_file=Path(token_file) if token_file else None,
        ca=Path(ca) if ca else None,
    )
    try:
        with cli.client(_COMPLETION_SECONDS) as client:
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
