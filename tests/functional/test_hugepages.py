"""A memory pool on hugetlbfs, where root can reserve pages and mount it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringstone.bench.hugepages import PAGE_BYTES, reserved
from ringstone.errors import NoSpaceError
from ringstone.models import PoolCreate
from tests.framework.gateway import GatewayProcess

MIB = 1 << 20
PAGES = 8


@pytest.fixture
def hugetlbfs(tmp_path: Path) -> Iterator[Path]:
    """A mount with PAGES free pages behind it."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount hugetlbfs")
    with reserved(PAGES) as free:
        if free < PAGES:
            pytest.skip(f"only {free} of {PAGES} huge pages can be had")
        path = tmp_path / "hugepages"
        path.mkdir()
        size = f"size={PAGES * PAGE_BYTES}"
        mounted = subprocess.run(
            ["mount", "-t", "hugetlbfs", "-o", size, "none", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode != 0:
            pytest.skip(f"hugetlbfs cannot be mounted here: {mounted.stderr.strip()}")
        yield path
        subprocess.run(["umount", str(path)], check=True)


def test_a_volume_lives_in_huge_pages_and_outlives_the_gateway(hugetlbfs: Path) -> None:
    with GatewayProcess() as gateway:
        gateway.start()
        with gateway.client() as client:
            pool = client.create_pool(
                PoolCreate(name="huge", type="memory", path=str(hugetlbfs / "pool"), hugepages=True)
            )
            assert pool.state == "ready"
            # Three MiB take two pages of two.
            client.create_volume("v", pool="huge", size=3 * MIB)
            assert (hugetlbfs / "pool/v.raw").stat().st_size == 4 * MIB
            assert client.volume("v").allocated == 4 * MIB
            assert client.attach("v").state == "listening"
            assert "2 MiB" in (client.volume("v").detail or "")
            client.resize_volume("v", 5 * MIB)
            with pytest.raises(NoSpaceError):
                client.create_volume("w", pool="huge", size=PAGES * PAGE_BYTES)
            assert [volume.name for volume in client.volumes()] == ["v"]
        gateway.restart()
        with gateway.client() as client:
            volume = client.volume("v")
            assert (volume.size, volume.state) == (5 * MIB, "ready")
            assert volume.attachment is not None
            assert volume.attachment.state == "listening"
            client.detach("v")
            client.delete_volume("v")
            client.delete_pool("huge")
    assert list(hugetlbfs.iterdir()) == []
