"""`ringstone top`"""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from ringstone.cli.context import IntervalOption, JsonOption, context_of, print_json
from ringstone.cli.live import show_live, until_interrupted, watch
from ringstone.cli.volume_stats import rates_json
from ringstone.rates import ReactorRates, VolumeRates, reactor_rates, volume_rates
from ringstone.units import format_latency, format_rate


def top(
    context: typer.Context,
    interval: IntervalOption = 1.0,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many intervals.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Show what reactors and volumes are doing, anew at each interval, until Ctrl-C. With --json one line each,
    in which removed reactors keep their places."""
    cli = context_of(context, json_output)
    with cli.client() as client, until_interrupted():
        readings = watch(client.stats, interval, count)
        if cli.json:
            for old, new in readings:
                print_json(
                    {
                        "reactors": [asdict(reactor) for reactor in reactor_rates(old, new)],
                        "volumes": [rates_json(volume) for volume in volume_rates(old, new)],
                    },
                    compact=True,
                )
        else:
            show_live(
                Group(_reactors(reactor_rates(old, new)), "", _volumes(volume_rates(old, new)))
                for old, new in readings
            )


def _reactors(reactors: list[ReactorRates]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("reactor", "CPU", "busy", "polling", "asleep", "queues"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for index, reactor in enumerate(reactors):
        if reactor.state == "removed":
            continue
        table.add_row(
            str(index),
            str(reactor.core),
            f"{reactor.busy:.1%}",
            f"{reactor.idle:.1%}",
            f"{reactor.asleep:.1%}",
            str(reactor.queues),
            reactor.state,
        )
    return table


def _volumes(volumes: list[VolumeRates]) -> Table:
    table = Table("volume", box=None, header_style="bold")
    columns = (
        "IOPS",
        "read IOPS",
        "write IOPS",
        "read MB/s",
        "write MB/s",
        "p50",
        "p99",
        "p99.9",
        "depth",
        "errors/s",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for volume in volumes:
        table.add_row(
            volume.volume,
            format_rate(volume.iops),
            format_rate(volume.read_iops),
            format_rate(volume.write_iops),
            f"{volume.read_bytes / 1e6:.1f}",
            f"{volume.write_bytes / 1e6:.1f}",
            format_latency(volume.p50_ns),
            format_latency(volume.p99_ns),
            format_latency(volume.p999_ns),
            str(volume.in_flight),
            format_rate(volume.errors),
        )
    if not volumes:
        table.add_row("no volume is attached", *[""] * len(columns))
    return table
