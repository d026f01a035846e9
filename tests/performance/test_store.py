"""The rows of `ringstone bench store`: what is reckoned from what was measured, and that every part runs."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringstone.bench import store as stores
from ringstone.bench.compare import Plan, Rounds
from ringstone.bench.results import Results
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Cores, Measurement, ReactorUse, Shape
from ringstone.bench.store_chain import offsets_of
from ringstone.bench.store_pauses import GIB, room_for_deletion
from ringstone.bench.store_steady import middle, steady_rows
from ringstone.bench.store_writes import first_rows, first_share
from ringstone.cli.app import app
from ringstone.errors import RingstoneError
from tests.performance.test_results import MACHINE
from tests.performance.test_smoke import leftovers

CORES = sorted(os.sched_getaffinity(0))[:2]
PROGRAMS = ("qemu-storage-daemon", "qemu-img", "qemu-io")
MISSING = [program for program in PROGRAMS if not shutil.which(program)]
WRITES = Shape(depth=32).writing()


def rounds(name: str, shape: Shape, *iops: float, busy: float | None = None) -> Rounds:
    use = ReactorUse(busy, 0.1) if busy is not None else None
    raw = {"operations": 1000}
    each = [Measurement(one, 1e9 / one * shape.depth, 0.0, reactor=use, raw=raw) for one in iops]
    return Rounds(name, shape, tuple(each))


@pytest.mark.parametrize(
    ("iops", "busy", "passed"), [(97.0, 560.0, [True, True]), (96.0, 561.0, [False, False])]
)
def test_steady_is_judged_by_the_ratio_of_iops_and_by_what_it_is_busy_more(
    iops: float, busy: float, passed: list[bool]
) -> None:
    theirs = rounds("file", WRITES, 100, 200, busy=500)
    rows = steady_rows("section", theirs, rounds("ringstone", WRITES, iops, 2 * iops, busy=busy))
    assert [row.passed for row in rows] == passed
    assert rows[1].limited_by == f"{busy - 500:+.0f} ns ({busy - 500:+.0f}..{busy - 500:+.0f})"


def test_a_place_on_the_drive_that_is_twice_as_fast_decides_nothing() -> None:
    fast, slow = (rounds("any", WRITES, iops, busy=busy) for iops, busy in ((200.0, 400.0), (100.0, 600.0)))
    rows = steady_rows("section", middle(fast, slow), middle(slow, fast))
    assert [(row.judged, row.passed) for row in rows] == [(1.0, True), (0.0, True)]


def test_what_no_stats_page_counted_is_not_judged() -> None:
    rows = steady_rows("section", rounds("file", WRITES, 100, busy=1), rounds("ringstone", WRITES, 100))
    assert [row.unit for row in rows] == ["IOPS"]


@pytest.mark.parametrize(
    ("ours", "half", "five"), [(250.0, True, True), (240.0, True, False), (90.0, False, False)]
)
def test_first_writes_are_judged_beside_overwrites_and_beside_qcow2(
    ours: float, half: bool, five: bool
) -> None:
    taken = (
        rounds("qcow2", WRITES, 100),
        rounds("qcow2 over another", WRITES, 50),
        rounds("overwrites", WRITES, 200),
        rounds("ringstone", WRITES, ours),
    )
    rows = first_rows("section", taken, 10_000)
    assert [(row.reference, row.passed) for row in rows] == [
        ("overwrites", half),
        ("qcow2 over another", five),
        ("qcow2", None),
    ]
    assert "95% of the writes" in rows[0].limited_by
    alone = tuple(replace(one, shape=Shape(depth=1).writing()) for one in taken)
    means = first_rows("section", alone, 10_000)
    assert [(row.unit, row.passed) for row in means] == [("ns", ours >= 100), ("IOPS", None), ("IOPS", None)]


def test_few_writes_to_many_blocks_are_nearly_all_first_ones() -> None:
    assert first_share(0, 100) == 1.0
    assert first_share(1, 1_000_000) == pytest.approx(1.0)
    assert first_share(100, 100) == pytest.approx(0.632, abs=0.001)


def test_a_chain_is_the_same_for_everybody() -> None:
    size = 1 << 20
    assert offsets_of(3, size) == offsets_of(3, size) != offsets_of(4, size)
    assert all(offset % 4096 == 0 and 0 <= offset < size for offset in offsets_of(3, size))


@pytest.mark.parametrize(
    ("free", "room"), [(100 * GIB, 10 * GIB), (20 * GIB, 6 * GIB), (8 * GIB, 0), (GIB, 0)]
)
def test_a_deletion_takes_no_more_of_the_drive_than_there_is(free: int, room: int) -> None:
    assert room_for_deletion(10 * GIB, free) == room


def test_a_part_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []

    def fail(setting: Setting, results: Results) -> None:
        raise RingstoneError("The drive is gone.")

    parts: dict[stores.Part, Any] = {
        stores.Part.STEADY: fail,
        stores.Part.SIZE: lambda setting, results: ran.append("size"),
    }
    monkeypatch.setattr(stores, "_PARTS", parts)
    setting = Setting(tmp_path, tmp_path, Cores(), Plan(), lambda text: None)
    results = Results(name="store", plan="", machine=MACHINE)
    stores.run([stores.Part.STEADY, stores.Part.SIZE], setting, results)
    assert ran == ["size"]
    assert results.notes[-1] == "**Not measured to its end: steady.** The drive is gone."
    with pytest.raises(RingstoneError, match="The drive is gone"):
        stores.run([stores.Part.STEADY], setting, results)


@pytest.mark.skipif(len(CORES) < 2, reason="the store and the clients need a core each")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize(
    ("part", "judged"),
    [
        pytest.param("steady", 24, marks=pytest.mark.soak),
        ("after-snapshot", 3),
        ("filling", 2),
        pytest.param("chain", 4, marks=pytest.mark.soak),
        ("snapshots", 4),
        ("deletion", 1),
        ("size", 3),
    ],
)
def test_every_part_is_measured(part: str, judged: int, tmp_path: Path) -> None:
    before = leftovers()
    places = ("--output", str(tmp_path), "--server-core", str(CORES[0]), "--client-core", str(CORES[1]))
    quick = ("--size", "64M", "--seconds", "0.1", "--warmup", "0", "--rounds", "1")
    arguments = ["--json", "bench", "store", "--only", part, *quick, *places]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    rows = json.loads(done.stdout)["rows"]
    assert len([row for row in rows if row["passed"] is not None]) == judged
    assert "`ringstone bench store`" in (tmp_path / "README.md").read_text()
    assert leftovers() == before
