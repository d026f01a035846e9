"""The benchmark of commands runs, and tells a build from what is none; how fast anything is, is not asked."""

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringstone.bench.commands import other_build
from ringstone.cli.app import app
from ringstone.errors import InvalidError
from tests.performance.test_smoke import leftovers

CORES = sorted(os.sched_getaffinity(0))[:2]
PROGRAM = Path(sys.executable).with_name("ringstone")


@pytest.mark.skipif(len(CORES) < 2, reason="the gateway and the commands have a core each")
@pytest.mark.parametrize("against", [[], ["--against", str(PROGRAM)]], ids=["nothing", "another build"])
def test_every_command_is_measured(against: list[str], tmp_path: Path) -> None:
    before, cores = leftovers(), os.sched_getaffinity(0)
    places = ("--output", str(tmp_path), "--server-core", str(CORES[0]), "--client-core", str(CORES[1]))
    arguments = ["--json", "bench", "commands", "--rounds", "2", *places, *against]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert [row["what"] for row in report["rows"]] == [
        "`volume list`",
        "`volume list --json`",
        "`volume show v0`",
    ]
    assert all(row["ratio"]["median"] > 0 for row in report["rows"])
    assert {row["reference"] for row in report["rows"]} == {
        "the other build" if against else "python -c pass"
    }
    assert all(len(raw["rounds"]) == 2 for raw in report["raw"])
    assert all(run["wall_ms"] > 0 and run["cpu_ms"] > 0 for raw in report["raw"] for run in raw["rounds"])
    assert "ringstone bench commands" in (tmp_path / "README.md").read_text()
    assert (leftovers(), os.sched_getaffinity(0)) == (before, cores)


def test_another_build_is_one_that_runs(tmp_path: Path) -> None:
    assert other_build(PROGRAM).path == PROGRAM
    for path in (tmp_path / "none", Path("/bin/echo")):
        with pytest.raises(InvalidError, match="is no `ringstone` that runs"):
            other_build(path)
    with pytest.raises(InvalidError, match="There is no Ringstone in"):
        other_build(tmp_path)
