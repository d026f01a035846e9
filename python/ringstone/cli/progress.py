"""Steps on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


class RichStep:
    """Implements ringstone.progress.Step."""

    def __init__(self) -> None:
        self.detail = ""


class RichProgress:
    """One line per finished step, a spinner for the running one; on standard error, so that --json stays
    clean."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, title: str) -> Iterator[RichStep]:
        step = RichStep()
        began = time.monotonic()
        with self._console.status(escape(title)):
            yield step
        took = f"{time.monotonic() - began:.1f} s"
        line = f"[green]✓[/green] {escape(title)} [dim]{escape(f'({took})')} {escape(step.detail)}[/dim]"
        self._console.print(line, soft_wrap=True)


@contextmanager
def bytes_done(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal. What it gives hears of the bytes that are done and of all."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(escape(title), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
