"""An upgrade to another release and back, under load: the two differ in their version, and in how they were built."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ringstone.version import version
from tests.framework.gateway import GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.pattern import running_pattern

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / ".cache/other-release/site"
# scripts/other-release's own choice.
OTHER_VERSION = "99.0.0"
# In `make test`; the tests that run for long wait for as long as it takes.
PATIENCE_SECONDS = 90


def build(patience_s: float | None) -> None:
    """Nothing is done when the tree is what it was the last time. What there is of a build that took too long is a
    beginning for the next one."""
    inputs = ("Cargo.toml", "Cargo.lock", "crates", "pyproject.toml", "python", "scripts/other-release")
    command = ["scripts/step", "other-release", "--inputs", *inputs, "--outputs", str(SITE)]
    with subprocess.Popen(
        [*command, "--", "scripts/other-release", OTHER_VERSION],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as step:
        try:
            said, _ = step.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            # The compilers too; the group is the step's own.
            os.killpg(step.pid, signal.SIGKILL)
            pytest.skip(
                f"another release takes more than {patience_s:.0f} s to build here; `make soak` waits"
            )
        except BaseException:
            os.killpg(step.pid, signal.SIGKILL)
            raise
    assert step.returncode == 0, said


@pytest.mark.parametrize("ring", [{"packed": False}, {"packed": True}], ids=["split", "packed"])
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_guests_do_not_notice_another_release(
    gateway: GatewayProcess, ring: dict[str, Any], rounds: int
) -> None:
    build(PATIENCE_SECONDS if rounds == 2 else None)
    releases = {version(): ROOT / "python", OTHER_VERSION: SITE}
    volume = gateway.serve("disk", queues=4)
    with running_pattern(volume.socket, queues=4, **ring) as load, gateway.client() as client:
        for _ in range(rounds):
            before = client.info().version
            (after,) = releases.keys() - {before}
            # As an operator does: with the command of the release that is to take over.
            report = gateway.upgrade(environment={"PYTHONPATH": str(releases[after])})
            assert (report["from_version"], report["to_version"]) == (before, after)
            assert client.info().version == after
            assert report["volumes"] == 1
    report = load.report
    assert report.passed, report.findings
    assert (report.reconnects, report.missed_calls) == (0, 0)
    assert report.blocks_checked == report.blocks_written > 0
