"""The subcommands, each imported when it is asked for: a gateway that starts again after a crash has guests
waiting, and importing every command would take it longer than serving them."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
import typer.core
import typer.main

# The name a person types, the module below ringstone.cli, and its function (None: the module's `app`).
_COMMANDS: dict[str, tuple[str, str | None]] = {
    "gateway": ("gateway", None),
    "manager": ("manager", "manager"),
    "host": ("host", None),
    "pool": ("pool", None),
    "volume": ("volume", None),
    "snapshot": ("snapshot", None),
    "store": ("store", None),
    "reactor": ("reactor", None),
    "state": ("state", None),
    "vm": ("vm", None),
    "bench": ("bench", None),
    "top": ("top", "top"),
    "status": ("status", "status"),
    "qemu-args": ("guest", "qemu_args"),
    "libvirt-xml": ("guest", "libvirt_xml"),
    "demo": ("demo", "demo"),
    "lab": ("lab", "lab"),
}


class _Commands(MutableMapping[str, Any]):
    """By name. Any: Typer carries a Click of its own, whose types are not for us."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load(name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**_COMMANDS, **self._loaded})

    def __len__(self) -> int:
        return len({**_COMMANDS, **self._loaded})


def _load(name: str) -> Any:
    place, function = _COMMANDS[name]
    module = import_module(f"ringstone.cli.{place}")
    alone = typer.Typer(pretty_exceptions_enable=False)
    if function is None:
        alone.add_typer(module.app, name=name)
    else:
        alone.command(name)(getattr(module, function))
    return typer.main.get_group(alone).commands[name]


class LazyGroup(typer.core.TyperGroup):
    """The group of all commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()
