"""A pool on a block device, as an operator has it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.devices import loop_device
from tests.framework.gateway import GatewayProcess

MIB = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Of 16 MiB, with a filesystem on it."""
    backing = tmp_path / "device.img"
    backing.touch()
    os.truncate(backing, 16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(backing)], check=True, capture_output=True)
    with loop_device(backing, 16 * MIB) as path:
        yield path


def test_no_guest_reads_what_was_on_the_device_before(device: Path) -> None:
    with GatewayProcess() as gateway:
        gateway.start()
        make = ("pool", "create", "disk", "--type", "file", "--path", str(device))
        refused = gateway.cli(*make, check=False)
        assert refused.returncode == 4
        assert "it holds ext4" in refused.stderr
        assert "--yes" in refused.stderr
        assert "disk" not in gateway.cli("pool", "list").stdout
        gateway.cli(*make, "--yes")
        for _ in range(2):
            gateway.cli("volume", "create", "v", "--pool", "disk", "--size", "8M")
            assert device.read_bytes()[: 8 * MIB] == bytes(8 * MIB)
            gateway.cli("volume", "attach", "v")
            subprocess.run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "oflag=sync", "status=none"])
            gateway.cli("volume", "resize", "v", "12M")
            assert device.read_bytes()[8 * MIB : 12 * MIB] == bytes(4 * MIB)
            gateway.cli("volume", "detach", "v")
            gateway.cli("volume", "delete", "v")
