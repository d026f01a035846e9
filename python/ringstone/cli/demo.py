"""`ringstone demo`"""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ringstone.cli.context import JsonOption, context_of, print_json, print_table, size_argument
from ringstone.cli.progress import RichProgress
from ringstone.errors import error_of_os
from ringstone.stopping import Stopping
from ringstone.units import format_latency, format_rate

if TYPE_CHECKING:
    from ringstone.demo.plan import DemoResult


class PoolChoice(StrEnum):
    FILE = "file"
    MEMORY = "memory"
    STORE = "store"


class AccelChoice(StrEnum):
    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


def demo(
    context: typer.Context,
    report: Annotated[Path, typer.Option(help="Where the HTML report goes.")] = Path("demo-report.html"),
    pool: Annotated[
        PoolChoice,
        typer.Option(
            "--pool",
            "--pool-type",
            help="What the volume is kept in. With a store the demo makes a snapshot and a clone too, and reverts.",
        ),
    ] = PoolChoice.FILE,
    size: Annotated[
        int, typer.Option(parser=size_argument, metavar="SIZE", help="The volume's size, at least 64M.")
    ] = 1 << 30,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=600, help="How long each of the four shapes is measured.")
    ] = 4,
    accel: Annotated[
        AccelChoice, typer.Option(help="auto takes KVM where a guest boots under it, else TCG.")
    ] = AccelChoice.AUTO,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Leave the folder with state, logs and volume behind, and print it."),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Boot a Linux guest on a volume of this machine, measure it with fio and verify it over a reboot.

    Exit code 0 only if every verification passed, 1 if one failed.
    """
    from ringstone.demo.plan import VERIFY_BYTES, DemoOptions
    from ringstone.demo.report import write_report
    from ringstone.demo.run import run_demo

    if size < VERIFY_BYTES:
        raise typer.BadParameter("The volume is too small to verify; give at least 64M.", param_hint="--size")
    as_json = context_of(context, json_output).json
    options = DemoOptions(pool=pool.value, size=size, seconds=seconds, accelerator=accel.value, keep=keep)
    with Stopping():
        result = run_demo(options, RichProgress())
    try:
        write_report(report, result)
    except OSError as error:
        raise error_of_os(error, f"writing {report}", "Choose another place with --report.") from error
    if as_json:
        print_json({**asdict(result), "passed": result.passed, "report": str(report.absolute())})
    else:
        _print(result, report)
    if not result.passed:
        raise typer.Exit(1)


def _print(result: "DemoResult", report: Path) -> None:
    table = Table("shape", box=None, header_style="bold")
    for column in ("IOPS", "mean", "p50", "p99", "p99.9", "gateway p50", "p99", "reactor busy"):
        table.add_column(column, justify="right")
    for measurement in result.measurements:
        guest, gateway = measurement.guest, measurement.gateway
        latencies = (round(guest.mean_ns), guest.p50_ns, guest.p99_ns, guest.p999_ns)
        table.add_row(
            measurement.title,
            format_rate(measurement.iops),
            *(format_latency(latency) for latency in latencies),
            format_latency(gateway.p50_ns if gateway else None),
            format_latency(gateway.p99_ns if gateway else None),
            f"{measurement.busy:.0%}",
        )
    print_table(table)
    checks = Table(box=None, show_header=False)
    for check in result.checks:
        mark = "[green]passed[/green]" if check.passed else "[red]FAILED[/red]"
        checks.add_row(escape(check.title), mark, escape(check.detail))
    print_table(checks)
    held = sum(check.passed for check in result.checks)
    print(
        f"{held} of {len(result.checks)} checks passed in {result.seconds:.0f} s. Report: {report.absolute()}"
    )
    if result.folder:
        print(f"State, logs and the console are in {result.folder}; remove it when you are done.")
