"""Store pools on real block devices, over a stand-in for the engine's stores."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringstone.errors import BusyError, ExistsError, InvalidError, NoDeviceError
from ringstone.pools import occupancy, open_pool, store
from ringstone.pools.store import StorePool
from ringstone.state import PoolRecord
from tests.framework.devices import loop_device
from tests.unit.store_fake import FakeStore, mark_of, stores

__all__ = ["stores"]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch, stores: type[FakeStore]) -> None:
    monkeypatch.setattr("ringstone.pools.store._PASSING_SECONDS", 0.0)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "device.img", 64 * MIB) as path:
        yield path


def new(device: Path, **options: int) -> StorePool:
    record = PoolRecord("p", "store", str(device), None, 1, {**options})
    return StorePool(store.placed(record, Path("/nowhere")))


def test_a_device_is_taken_as_a_whole_and_stays(device: Path) -> None:
    with pytest.raises(InvalidError, match="leave the size out"):
        new(device, size=32 * MIB).prepare()
    pool = new(device)
    pool.prepare()
    assert pool.space().size == 64 * MIB
    with pytest.raises(InvalidError, match="is a device, which has its own size"):
        pool.grow(128 * MIB)
    StorePool(pool.record).discard()
    assert mark_of(device) == [bytes(8)] * 2
    assert FakeStore.opened == set()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (("mkfs.ext4", "-q", "-F"), "ext4"),
        (("mkswap",), "swap"),
        (("wipefs", "--no-act"), None),
    ],
)
def test_what_a_device_holds_is_asked_for_and_leaves_no_trace(
    device: Path, make: tuple[str, ...], named: str | None
) -> None:
    subprocess.run([*make, str(device)], check=True, capture_output=True)
    if named is not None:
        with pytest.raises(ExistsError, match=f"{device} is not empty: it holds .*{named}.*--yes"):
            new(device).prepare()
        assert named in str(occupancy.content(str(device)))
    new(device).prepare(erase=True)
    found = subprocess.run(["wipefs", "--no-act", "-O", "TYPE", str(device)], capture_output=True, text=True)
    assert found.stdout.strip() == ""


def test_a_partition_table_s_backup_goes_too(device: Path) -> None:
    """Left at the end of the device, it would bring the table back."""
    # As of a GPT: its header is in the last sector.
    with device.open("r+b") as drive:
        drive.seek(64 * MIB - 512)
        drive.write(b"EFI PART")
    with pytest.raises(ExistsError, match="it holds"):
        new(device).prepare()
    new(device).prepare(erase=True)
    with device.open("rb") as drive:
        drive.seek(64 * MIB - 512)
        assert drive.read(512) == bytes(512)


def refused(device: Path, erase: bool, match: str) -> None:
    with pytest.raises(BusyError, match=match):
        new(device).prepare(erase=erase)


@pytest.mark.parametrize("erase", [False, True])
def test_a_device_in_use_is_refused_whatever_may_be_lost(device: Path, erase: bool, tmp_path: Path) -> None:
    held = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        refused(device, erase, str(device))
    finally:
        os.close(held)
    with device.open("rb") as opened, subprocess.Popen(["sleep", "60"], stdin=opened) as user:
        try:
            refused(device, erase, rf"is open in sleep \(process {user.pid}\)")
        finally:
            user.kill()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True, capture_output=True)
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", str(device), str(place)], check=False, capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        refused(device, erase, "Unmount it")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_store_s_device_is_no_file_pool_s(device: Path) -> None:
    pool = new(device)
    pool.prepare()
    with pytest.raises(ExistsError, match="not empty"):
        open_pool(PoolRecord("q", "file", str(device), None, 1)).prepare()


def test_a_device_under_another_name_is_the_same(device: Path, tmp_path: Path) -> None:
    pool = new(device)
    pool.prepare()
    link = tmp_path / "by-id"
    link.symlink_to(device)
    assert new(link).identity() == pool.identity()
    assert occupancy.medium(str(link)) == occupancy.medium(str(device))


def test_a_device_that_is_gone_is_told(tmp_path: Path) -> None:
    with loop_device(tmp_path / "device.img", 64 * MIB) as device:
        link = tmp_path / "by-id"
        link.symlink_to(device)
        pool = new(link)
        pool.prepare()
    link.unlink()
    uses: list[Callable[[], object]] = [StorePool(pool.record).check, StorePool(pool.record).usage]
    for use in uses:
        with pytest.raises(NoDeviceError, match="cabling"):
            use()
    StorePool(pool.record).discard()
