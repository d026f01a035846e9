"""What `ringstone volume stats` shows."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from ringstone.cli.context import CliContext, print_json, print_table
from ringstone.cli.live import show_live, until_interrupted, watch
from ringstone.rates import VolumeRates, VolumeTotals, totals, volume_rates
from ringstone.stats import Histogram
from ringstone.units import format_latency, format_rate, format_size

_SHARES = {"p50": 0.50, "p99": 0.99, "p99.9": 0.999}


def show_stats(cli: CliContext, name: str, interval: float | None, count: int | None) -> None:
    """Of volume `name`: what it has done, or every `interval` seconds, `count` times or without end, what it does."""
    with cli.client() as client, until_interrupted():
        if interval is None:
            sums = totals(client.stats(volume=name), name)
            if cli.json:
                print_json(_totals_json(sums))
            else:
                print_table(_totals_table(sums))
                print(_totals_line(sums))
            return
        readings = watch(lambda: client.stats(volume=name), interval, count)
        if cli.json:
            for old, new in readings:
                for rates in volume_rates(old, new):
                    print_json(rates_json(rates), compact=True)
        else:
            show_live(_rates_table(name, volume_rates(old, new)) for old, new in readings)


def rates_json(rates: VolumeRates) -> dict[str, Any]:
    """Rates per second; latencies in nanoseconds."""
    plain = asdict(rates)
    del plain["latency"]
    return plain | {
        "iops": rates.iops,
        "p50_ns": rates.p50_ns,
        "p99_ns": rates.p99_ns,
        "p999_ns": rates.p999_ns,
    }


def _latency_json(latency: Histogram) -> dict[str, int | float | None]:
    return {
        "count": latency.count,
        "mean_ns": latency.mean(),
        **{f"{name.replace('.', '')}_ns": latency.percentile(share) for name, share in _SHARES.items()},
    }


def _totals_json(sums: VolumeTotals) -> dict[str, Any]:
    return {
        "volume": sums.volume,
        "queues": sums.queues,
        "in_flight": sums.in_flight,
        **sums.counters,
        "read_latency": _latency_json(sums.read_latency),
        "write_latency": _latency_json(sums.write_latency),
        "other_latency": _latency_json(sums.other_latency),
    }


def _totals_table(sums: VolumeTotals) -> Table:
    table = Table("", box=None, header_style="bold")
    for column in ("operations", "bytes", "mean", *_SHARES):
        table.add_column(column, justify="right")
    counters = sums.counters
    others = counters["flushes"] + counters["discards"] + counters["zeroes"] + counters["others"]
    rows = (
        ("reads", counters["reads"], counters["bytes_read"], sums.read_latency),
        ("writes", counters["writes"], counters["bytes_written"], sums.write_latency),
        ("others", others, counters["bytes_discarded"], sums.other_latency),
    )
    for label, operations, size, latency in rows:
        mean = latency.mean()
        table.add_row(
            label,
            str(operations),
            format_size(size),
            format_latency(None if mean is None else round(mean)),
            *(format_latency(latency.percentile(share)) for share in _SHARES.values()),
        )
    return table


def _totals_line(sums: VolumeTotals) -> str:
    counters = sums.counters
    counted = ", ".join(f"{counters[name]} {name}" for name in ("errors", "bounces", "kicks", "calls"))
    return f"{sums.queues} queues, {sums.in_flight} in flight, {counted}"


def _rates_table(name: str, rates: list[VolumeRates]) -> Table:
    table = Table(title=f"volume {name}", box=None, header_style="bold", title_justify="left")
    columns = ("read IOPS", "write IOPS", "read MB/s", "write MB/s", *_SHARES, "in flight", "errors/s")
    for column in columns:
        table.add_column(column, justify="right")
    for one in rates:
        table.add_row(
            format_rate(one.read_iops),
            format_rate(one.write_iops),
            f"{one.read_bytes / 1e6:.1f}",
            f"{one.write_bytes / 1e6:.1f}",
            format_latency(one.p50_ns),
            format_latency(one.p99_ns),
            format_latency(one.p999_ns),
            str(one.in_flight),
            format_rate(one.errors),
        )
    if not rates:
        table.add_row("not attached", *[""] * (len(columns) - 1))
    return table
