"""The benchmark of guests under several QEMUs runs; how fast they are is not asked."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringstone.bench.hypervisors import hypervisors_of
from ringstone.cli.app import app
from ringstone.errors import InvalidError
from tests.framework.qemus import program

CORES = sorted(os.sched_getaffinity(0))[:2]


@pytest.mark.guest
@pytest.mark.soak
@pytest.mark.skipif(len(CORES) < 2, reason="the gateway and the guests have a core each")
def test_every_qemu_is_measured(tmp_path: Path) -> None:
    programs = [argument for version in ("7.2", "11.1") for argument in ("--qemu", str(program(version)))]
    places = ("--output", str(tmp_path), "--server-core", str(CORES[0]), "--client-core", str(CORES[1]))
    arguments = ["--json", "bench", "hypervisors", "--rounds", "1", "--seconds", "0.3", *programs, *places]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 4
    assert {row["section"] for row in rows} == {"QEMU 11.1 beside 7.2"}
    assert all(row["ratio"]["median"] > 0 for row in rows)
    assert all("busy 0 ns" not in row["limited_by"] for row in rows)


def test_two_versions_are_what_is_compared() -> None:
    one = program("10.0")
    for programs in ([], [one], [one, one]):
        with pytest.raises(InvalidError, match="at least twice, each with another version"):
            hypervisors_of(programs)
