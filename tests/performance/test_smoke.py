"""Every benchmark runs, on volumes so small and for so short a time that the figures mean nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringstone.bench import hugepages
from ringstone.cli.app import app

QUICK = ("--size", "8M", "--seconds", "0.1", "--warmup", "0", "--rounds", "1")

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="server and client poll, each on a core of its own"
)


def run(*arguments: str) -> dict[str, Any]:
    pool = hugepages.POOL.read_text()
    first, second = sorted(os.sched_getaffinity(0))[:2]
    cores = ("--server-core", str(first), "--client-core", str(second))
    done = CliRunner().invoke(app, ["--json", "bench", *arguments, *QUICK, *cores], catch_exceptions=False)
    assert done.exit_code == 0
    assert hugepages.POOL.read_text() == pool
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def leftovers() -> set[Path]:
    return {path for place in ("/dev/shm", "/var/tmp") for path in Path(place).glob("ringstone-bench-*")}


def test_the_bare_ring() -> None:
    report = run("limit", "--depth", "8", "--read-share", "50")
    (ring,) = report["contenders"]
    assert ring["rounds"][0]["operations"] > 0
    assert ring["rounds"][0]["read"]["count"] > 0
    assert ring["rounds"][0]["write"]["count"] > 0


@pytest.mark.parametrize("volume", ["memory", "file", "null"])
def test_a_volume(volume: str) -> None:
    report = run("gateway", "--volume-type", volume, "--depth", "4", "--queues", "2")
    (ours,) = report["contenders"]
    assert [queue["errors"] for queue in ours["rounds"][0]["queues"]] == [0, 0]
    assert all(queue["operations"] > 0 for queue in ours["rounds"][0]["queues"])
    assert ours["reactor_busy_ns"] > 0


@pytest.mark.parametrize("against", ["qemu-storage-daemon", "fio"])
def test_a_file_beside_another_program(against: str, tmp_path: Path) -> None:
    before = leftovers()
    file = tmp_path / "volume"
    report = run("gateway", "--volume-type", "file", "--file", str(file), "--against", against)
    theirs, ours = report["contenders"]
    assert theirs["name"].startswith(against)
    assert theirs["iops"]["median"] > 0
    assert ours["iops"]["median"] > 0
    assert not file.exists()
    assert leftovers() == before


def test_sections_of_the_suite_are_judged_and_written(tmp_path: Path) -> None:
    before = leftovers()
    report = run("suite", "--only", "memory", "--only", "rest", "--output", str(tmp_path))
    sections = [row["section"] for row in report["rows"]]
    assert [sections.count(section) for section in dict.fromkeys(sections)] == [10, 2, 3]
    assert all(row["limited_by"] and row["bar"] for row in report["rows"])
    (raw,) = tmp_path.glob("*.json")
    assert json.loads(raw.read_text()) == report
    assert "bare ring" in (tmp_path / "README.md").read_text()
    assert leftovers() == before
