"""The demo's report and its verdict; the run itself is an interop test."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ringstone.cli import demo as cli_demo
from ringstone.cli.context import CliContext
from ringstone.demo import run
from ringstone.demo.chart import BINS_PER_DECADE, Series, latency_chart, log_bins
from ringstone.demo.plan import (
    MEASURED_BYTES,
    Check,
    DemoOptions,
    DemoResult,
    Latency,
    Measurement,
    fill,
    shapes,
)
from ringstone.demo.report import render_report
from ringstone.progress import Progress

LATENCY = Latency(100, 12_000.0, 10_000, 40_000, 50_000, [(9_000, 11_000, 90), (36_000, 44_000, 10)])
RESULT = DemoResult(
    setting=[("Machine", "<EPYC> & 2 CPUs")],
    measurements=[Measurement("4 KiB random read, depth 1", "read", 12345.0, 5e7, LATENCY, LATENCY, 0.25)],
    checks=[Check("Blocks checked", True, "16384 of 16384")],
    seconds=100.0,
)
FAILED = replace(
    RESULT, checks=[*RESULT.checks, Check("Blocks checked after the reboot", False, "<bad> block")]
)


class _Document(HTMLParser):
    """Fails on unbalanced tags, scripts and anything that would be fetched."""

    VOID = ("meta", "br", "line", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onclick", "onload"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_file_that_needs_nothing() -> None:
    page = render_report(FAILED)
    document = _Document(page)
    assert "url(" not in page
    assert "@import" not in page
    assert "4 KiB random read, depth 1" in document.text
    assert "<EPYC> & 2 CPUs" in document.text
    assert "<bad> block" in document.text


def test_the_verdict_is_that_of_the_checks() -> None:
    assert '<p class="verdict passed">1 of 1 checks passed</p>' in render_report(RESULT)
    assert '<p class="verdict failed">1 of 2 checks passed</p>' in render_report(FAILED)
    assert not replace(RESULT, checks=[]).passed


def test_logarithmic_bins_keep_every_request() -> None:
    bins = [(1, 1, 5), (900, 1_100, 70), (1_000, 1_000_000, 300), (10_000_000, 10_000_001, 25)]
    counts = log_bins(bins)
    assert sum(counts.values()) == pytest.approx(400)
    # A bin over three decades is shared out evenly on the logarithmic axis.
    assert counts[4 * BINS_PER_DECADE] == pytest.approx(10)
    assert counts[0] == pytest.approx(5)


def test_a_chart_tells_the_share_of_each_bin() -> None:
    chart = latency_chart([Series("Guest", "guest", LATENCY)])
    shares = [float(share) for share in re.findall(r"Guest: ([\d.]+)% took", chart)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert latency_chart([Series("Guest", "guest", replace(LATENCY, bins=[]))]) == ""


def test_the_two_shapes_are_measured_for_reads_and_writes() -> None:
    jobs = [shape.job for shape in shapes(4, 1 << 30)]
    assert [(job.pattern, job.engine, job.depth, job.jobs) for job in jobs] == [
        ("randread", "psync", 1, 1),
        ("randwrite", "psync", 1, 1),
        ("randread", "io_uring", 128, 4),
        ("randwrite", "io_uring", 128, 4),
    ]
    assert {job.block_size for job in jobs} == {4096}
    # What is read was filled before.
    assert {job.size for job in jobs} == {fill(1 << 30).size} == {MEASURED_BYTES}
    assert fill(MEASURED_BYTES // 2).size == MEASURED_BYTES // 2


@pytest.mark.parametrize(("result", "exit_code"), [(RESULT, 0), (FAILED, 1)])
def test_the_exit_code_tells_whether_every_check_passed(
    result: DemoResult, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished(_: DemoOptions, progress: Progress) -> DemoResult:
        with progress.step("Nothing") as step:
            step.detail = "done"
        return result

    monkeypatch.setattr(run, "run_demo", finished)
    app = typer.Typer()
    app.command()(cli_demo.demo)
    report = tmp_path / "report.html"
    context = CliContext(socket=tmp_path / "none", json=False)
    done = CliRunner().invoke(app, ["--report", str(report)], obj=context)
    assert done.exit_code == exit_code, done.output
    assert "4 KiB random read, depth 1" in done.output
    assert report.exists()
