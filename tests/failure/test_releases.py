"""An upgrade from an older release and back, under load. The older one is built from its own commit by
scripts/older-release."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ringstone.version import version
from tests.framework.gateway import GatewayFailedError, GatewayProcess
from tests.framework.pattern import running_pattern

ROOT = Path(__file__).resolve().parents[2]
OLDER = ROOT / ".cache/older-release/site"
NEWER = ROOT / "python"

# What a release says about itself. The older one calls its state `store`.
SAYS = """
try:
    from ringstone.state.migrations import MIGRATIONS
except ModuleNotFoundError:
    from ringstone.store.migrations import MIGRATIONS
from ringstone.version import version
print(version(), len(MIGRATIONS))
"""


def says(release: Path) -> tuple[str, int]:
    """Its version, and the schema of its state."""
    done = subprocess.run(
        [sys.executable, "-c", SAYS],
        env=os.environ | {"PYTHONPATH": str(release)},
        capture_output=True,
        text=True,
        check=True,
    )
    name, schema = done.stdout.split()
    return name, int(schema)


@pytest.mark.parametrize("ring", [{"packed": False}, {"packed": True}], ids=["split", "packed"])
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_guests_do_not_notice_an_upgrade_from_an_older_release(ring: dict[str, Any], rounds: int) -> None:
    """And back again, where the older one can read the state; otherwise it refuses, and the newer one goes on."""
    assert OLDER.is_dir(), "There is no older release. Build it: make older-release."
    (old, old_schema), (new, new_schema) = says(OLDER), says(NEWER)
    assert old != new == version()
    environment = {"PYTHONPATH": str(OLDER)}
    with GatewayProcess(environment=environment) as gateway:
        gateway.start()
        volume = gateway.serve("disk", queues=4)
        with running_pattern(volume.socket, queues=4, **ring) as load, gateway.client() as client:
            for _ in range(rounds):
                assert client.info().version == old
                upgrade(gateway, NEWER, old, new)
                if old_schema != new_schema:
                    with pytest.raises(GatewayFailedError, match=f"has schema {new_schema}"):
                        gateway.upgrade(environment=environment)
                    assert client.info().version == new
                    break
                upgrade(gateway, OLDER, new, old)
        report = load.report
    assert report.passed, report.findings
    assert (report.reconnects, report.missed_calls) == (0, 0)
    assert report.blocks_checked == report.blocks_written > 0


def upgrade(gateway: GatewayProcess, release: Path, before: str, after: str) -> None:
    """As an operator does: with the command of the release that is to take over."""
    report = gateway.upgrade(environment={"PYTHONPATH": str(release)})
    assert (report["from_version"], report["to_version"], report["volumes"]) == (before, after, 1)
