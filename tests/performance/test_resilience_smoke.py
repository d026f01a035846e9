"""Every row on crashes, upgrades, many cores and hostile neighbours runs, for so short a time that the figures mean
nothing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ringstone
from ringstone.bench import neighbours, rings, scaling, stalls
from ringstone.bench.compare import Plan
from ringstone.bench.results import Results
from ringstone.bench.setting import Setting, prepared
from ringstone.bench.shape import Cores, Shape, Window
from ringstone.cli.app import app
from tests.performance.test_results import MACHINE
from tests.performance.test_smoke import leftovers

CORES = sorted(os.sched_getaffinity(0))[:2]

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="server and client poll, each on a core of its own")


@pytest.fixture
def setting() -> Iterator[Setting]:
    before = leftovers()
    plan = Plan(rounds=1, window=Window(seconds=0.2, warmup=0.0))
    with prepared(cores=Cores(*CORES), plan=plan, progress=lambda text: None, size=8 << 20) as setting:
        yield setting
    assert leftovers() == before


@pytest.fixture
def results() -> Results:
    return Results(name="resilience", plan="", machine=MACHINE)


def test_a_crash(setting: Setting, results: Results) -> None:
    stalls.crash(setting, results)
    gap, listening, reconnect, first, ready = (row.value.median for row in results.rows)
    assert gap > listening > 0
    assert gap >= reconnect + first
    assert ready > 0


def test_an_upgrade(setting: Setting, results: Results) -> None:
    stalls.upgrade(setting, results, cases=(("memory", 2),))
    (told,) = results.raw[0].rounds
    assert told["told"]["stall_ms"] > 0
    assert told["told"]["drain_ms"] <= told["told"]["stall_ms"]
    assert len(results.rows) == 3


def test_a_move(setting: Setting, results: Results) -> None:
    stalls.move(setting, results)
    assert results.raw[0].rounds[0]["moves"] > 0
    assert len(results.rows) == 4


def test_hostile_neighbours(setting: Setting, results: Results) -> None:
    neighbours.neighbours(setting, results)
    # Of a short window the long reads may not see the end of one; that they began was waited for.
    assert all(raw.rounds[0]["count"] > 0 for raw in results.raw[:4])
    # Four storms and three kinds of long reads, two figures each.
    assert len(results.rows) == 14


def test_one_disk_on_many_cores(setting: Setting, results: Results) -> None:
    scaling.scaling(setting, results, shapes=(Shape(depth=4),))
    assert [raw.shape["queues"] for raw in results.raw] == [1, 1, 2, 2, 4, 4] * 2
    assert {raw.contender for raw in results.raw} == {"one reactor", "two reactors"}


def test_ring_formats(setting: Setting, results: Results) -> None:
    rings.formats(setting, results, shapes=(Shape(depth=4, inflight=False),))
    chosen = [(raw.shape["packed"], raw.shape["inflight"]) for raw in results.raw]
    assert chosen == [(False, False), (False, True), (True, False), (True, True)] * 2
    assert len(results.rows) == 6


def test_an_earlier_release_runs_from_where_it_is(setting: Setting, results: Results, tmp_path: Path) -> None:
    """This very release, by another way."""
    (tmp_path / "ringstone").symlink_to(Path(ringstone.__file__).parent)
    rings.previous(setting, results, tmp_path, shapes=(Shape(depth=4, inflight=False),))
    assert [row.reference for row in results.rows] == ["earlier release"] * 2


def test_the_command_writes_its_tables(tmp_path: Path) -> None:
    arguments = ("--only", "idle", "--only", "log", "--output", str(tmp_path))
    quick = ("--size", "8M", "--seconds", "0.1", "--warmup", "0", "--rounds", "1")
    cores = ("--server-core", str(CORES[0]), "--client-core", str(CORES[1]))
    done = CliRunner().invoke(
        app, ["--json", "bench", "resilience", *arguments, *quick, *cores], catch_exceptions=False
    )
    assert done.exit_code == 0
    (raw,) = tmp_path.glob("*-resilience.json")
    written = json.loads(raw.read_text())
    assert written == json.loads(done.stdout)
    assert [row["section"].split()[0] for row in written["rows"]] == ["the", "the", "idle,"]
    assert "`ringstone bench resilience`" in (tmp_path / "README.md").read_text()
