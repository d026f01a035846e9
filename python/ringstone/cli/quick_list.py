"""`ringstone volume list` without the command line's libraries: a person or a script waits for it.

Only the table of this host's gateway is understood here. Whatever else there is (help, errors, JSON, a manager) is left
to the real command, ringstone.cli.volume.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ringstone.gateway.paths import DEFAULT_SOCKET


@dataclass(frozen=True, slots=True)
class ListFlags:
    """Of `ringstone volume list`: the gateway's socket, and the one pool whose volumes are wanted."""

    socket: str
    pool: str | None = None


def list_flags(arguments: Sequence[str]) -> ListFlags | None:
    """The flags of `[--socket PATH] volume list [--pool POOL]`; None where the real command must look at it."""
    rest = list(arguments)
    socket = os.environ.get("RINGSTONE_SOCKET") or str(DEFAULT_SOCKET)
    if rest[:1] == ["--socket"] and len(rest) > 1:
        socket = rest[1]
        del rest[:2]
    elif os.environ.get("RINGSTONE_MANAGER"):
        return None
    if rest[:2] != ["volume", "list"] or not _plain(socket):
        return None
    match rest[2:]:
        case []:
            return ListFlags(socket)
        case ["--pool", pool] if _plain(pool):
            return ListFlags(socket, pool)
        case [option] if option.startswith("--pool="):
            return ListFlags(socket, option.removeprefix("--pool="))
    return None


def _plain(value: str) -> bool:
    """Whether it cannot be taken for an option, or for nothing."""
    return value != "" and not value.startswith("-")
