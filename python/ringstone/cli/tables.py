"""Tables on standard output."""

from typing import TYPE_CHECKING

# Imported where a table is made: it takes longer than most commands.
if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


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
