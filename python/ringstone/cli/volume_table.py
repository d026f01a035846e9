"""The table of `ringstone volume list`."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from ringstone.cli.tables import add_row
from ringstone.units import format_size


def volume_table(volumes: Iterable[Mapping[str, Any]]) -> Table:
    """Of volumes with the fields of models.Volume."""
    table = Table("volume", "pool", box=None, header_style="bold")
    for column in ("size", "allocated", "block"):
        table.add_column(column, justify="right")
    for column in ("state", "attached", "host"):
        table.add_column(column)
    for volume in volumes:
        attachment = volume["attachment"]
        add_row(
            table,
            volume["name"],
            volume["pool"],
            format_size(volume["size"]),
            "-" if volume["allocated"] is None else format_size(volume["allocated"]),
            str(volume["block_size"]),
            volume["state"],
            attachment["state"] if attachment else "no",
            attachment["host"] if attachment else "-",
        )
    return table
