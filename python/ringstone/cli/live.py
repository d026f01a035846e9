"""Readings of the counters at an interval, and tables that renew themselves in place."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count as counting

from rich.console import Console, RenderableType
from rich.live import Live

from ringstone.stats import Snapshot


def watch(
    read: Callable[[], Snapshot], interval: float, count: int | None
) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Pairs of readings `interval` seconds apart: `count` of them, or without end."""
    old = read()
    for _ in range(count) if count is not None else counting():
        time.sleep(interval)
        new = read()
        yield old, new
        old = new


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C is how a person ends such a command, and no error."""
    with suppress(KeyboardInterrupt):
        yield


def show_live(tables: Iterable[RenderableType]) -> None:
    """Each in place of the one before; one after the other where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
        for table in tables:
            console.print(table)
        return
    with Live(console=console, auto_refresh=False) as live:
        for table in tables:
            live.update(table, refresh=True)
