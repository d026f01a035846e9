"""The table and the raw figures that are kept."""

import json
from pathlib import Path

from ringstone.bench.compare import Rounds
from ringstone.bench.machine import Machine
from ringstone.bench.results import Results, Row, figure, markdown, ratio_text
from ringstone.bench.shape import Measurement, ReactorUse, Shape
from ringstone.bench.spread import Bar, Spread

MACHINE = Machine(
    cpu="A processor",
    cores=2,
    virtualised=True,
    memory_bytes=24 << 30,
    kernel="6.1.0",
    distribution="Debian GNU/Linux 12 (bookworm)",
    hugepages=0,
    hugepage_bytes=2 << 20,
    revision="0123456789ab",
    versions={"ringstone": "0.1.0", "fio": "fio-3.33"},
    load_average=0.25,
    at="2030-01-02T03:04:05+0000",
)


def results() -> Results:
    rows = [
        Row.relative(
            "memory volume",
            "depth 1",
            "ns",
            Spread(900, 1000, 1100),
            ("bare ring", Spread(700, 800, 900)),
            Spread(1.2, 1.25, 1.4),
            Bar("at most 1.3", at_most=1.3),
            "the way between the cores",
        ),
        Row.absolute(
            "at rest", "CPU", "% of a core", Spread(0.5, 1.5, 2), Bar("at most 1 %", at_most=1), "timers"
        ),
    ]
    return Results(name="gateway", plan="2 rounds", machine=MACHINE, rows=rows)


def test_a_row_is_judged_by_its_median_ratio_or_figure() -> None:
    relative, absolute = results().rows
    assert (relative.judged, relative.passed) == (1.25, True)
    assert (absolute.judged, absolute.passed) == (1.5, False)
    assert not results().passed
    assert not Results(name="none", plan="", machine=MACHINE).passed


def test_figures_are_written_with_their_spread() -> None:
    assert figure(Spread(1200, 1234.4, 1300), "IOPS") == "1,234 (1,200..1,300) IOPS"
    assert figure(Spread(0.5, 1.234, 12.5), "ms") == "1.23 (0.5..12.5) ms"
    assert ratio_text(Spread(0.9, 1, 1.333)) == "1.00 (0.90..1.33)"


def test_the_table_tells_everything_a_reader_needs() -> None:
    text = markdown([(results(), "raw.json")], ["older.json"])
    assert (
        "| depth 1 | 1,000 (900..1,100) ns | bare ring: 800 (700..900) ns | 1.25 (1.20..1.40) | at most 1.3 "
        "| yes | the way between the cores |"
    ) in text
    assert "| CPU | 1.5 (0.5..2) % of a core | - | - | at most 1 % | **no** | timers |" in text
    for part in ("A processor, 2 cores, virtualised", "fio 3.33", "[raw.json](raw.json)", "0123456789ab"):
        assert part in text
    assert text.index("## Memory volume") < text.index("## At rest") < text.index("- [older.json]")


def test_results_are_written_beside_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "2029-01-01-gateway.json").write_text("{}")
    made = results()
    one = Measurement(iops=2.0, mean_ns=3.0, p99_ns=4.0, reactor=ReactorUse(5.0, 0.5), raw={"mode": "load"})
    made.keep("memory volume", Rounds("ringstone", Shape(depth=4), (one,)))
    path = made.write(tmp_path)
    assert path.name == "2030-01-02-gateway.json"
    raw = json.loads(path.read_text())["raw"][0]
    assert (raw["contender"], raw["shape"]["depth"]) == ("ringstone", 4)
    assert (raw["rounds"][0]["reactor_busy_ns"], raw["rounds"][0]["report"]) == (5.0, {"mode": "load"})
    assert "[2029-01-01-gateway.json]" in (tmp_path / "README.md").read_text()
