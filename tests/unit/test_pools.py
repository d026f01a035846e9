"""Pools on real directories and, where this process may make them, block devices."""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ringstone.errors import (
    BusyError,
    ExistsError,
    FailedError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    RingstoneError,
    StorageError,
)
from ringstone.pools import host, open_pool
from ringstone.pools.device import DevicePool
from ringstone.pools.memory import default_path
from ringstone.state import PoolRecord, VolumeRecord, VolumeState

MIB = 1 << 20


def record(kind: str, path: Path | str | None, **options: object) -> PoolRecord:
    return PoolRecord("p", kind, str(path) if path else None, None, 1, options)  # type: ignore[arg-type]


def volume(name: str = "v", size: int = 8 * MIB) -> VolumeRecord:
    return VolumeRecord(name, f"id-of-{name}", "p", size, 512, VolumeState.READY, 2)


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """A block device of 16 MiB."""
    backing = tmp_path / "device.img"
    backing.write_bytes(b"")
    os.truncate(backing, 16 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


# file


def test_a_file_volume_is_a_thin_private_file(tmp_path: Path) -> None:
    pool = open_pool(record("file", tmp_path))
    pool.prepare()
    pool.create_backing(volume())
    found = (tmp_path / "v.raw").stat()
    assert (found.st_size, found.st_blocks, found.st_mode & 0o777) == (8 * MIB, 0, 0o600)
    assert pool.allocated(volume()) == 0
    assert pool.backend(volume()) == {"type": "file", "path": str(tmp_path / "v.raw"), "direct": "auto"}
    pool.check_backing(volume())
    pool.remove_backing(volume())
    pool.remove_backing(volume())
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_or_removed_is_on_stable_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    pool = open_pool(record("file", tmp_path))
    open_files = len(os.listdir("/proc/self/fd"))
    pool.create_backing(volume())
    assert synced == [str(tmp_path / "v.raw"), str(tmp_path)]
    pool.resize_backing(volume(), 16 * MIB)
    assert synced[2:] == [str(tmp_path / "v.raw")]
    pool.remove_backing(volume())
    assert synced[3:] == [str(tmp_path)]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_file_grows_and_keeps_its_content(tmp_path: Path) -> None:
    pool = open_pool(record("file", tmp_path))
    pool.create_backing(volume())
    (tmp_path / "v.raw").write_bytes(b"x" * 8 * MIB)
    pool.resize_backing(volume(), 16 * MIB)
    content = (tmp_path / "v.raw").read_bytes()
    assert (len(content), content[: 8 * MIB].strip(b"x"), content[8 * MIB :].strip(b"\0")) == (
        16 * MIB,
        b"",
        b"",
    )


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_foreign_file_is_never_touched(kind: str, memory_dir: Path) -> None:
    (memory_dir / "v.raw").write_bytes(b"precious")
    pool = open_pool(record(kind, memory_dir))
    with pytest.raises(ExistsError, match="belongs to no volume"):
        pool.refuse_foreign(volume())
    with pytest.raises(ExistsError, match="belongs to no volume"):
        pool.create_backing(volume())
    assert (memory_dir / "v.raw").read_bytes() == b"precious"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/v.raw").symlink_to(tmp_path / "elsewhere")
    pool = open_pool(record("file", tmp_path / "pool"))
    with pytest.raises(ExistsError):
        pool.create_backing(volume())
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_directory_is_told_and_not_made(tmp_path: Path) -> None:
    pool = open_pool(record("file", tmp_path / "not-mounted"))
    for use in (pool.prepare, pool.check, pool.usage, lambda: pool.create_backing(volume())):
        with pytest.raises(NoDeviceError, match="not-mounted"):
            use()
    with pytest.raises(FailedError, match="not-mounted"):
        pool.restore_backing(volume(), new_boot=True)
    assert not (tmp_path / "not-mounted").exists()


def test_a_managed_directory_comes_and_goes_with_its_pool(tmp_path: Path) -> None:
    pool = open_pool(record("file", tmp_path / "pools/p", managed=True))
    pool.prepare()
    assert (tmp_path / "pools/p").stat().st_mode & 0o777 == 0o700
    pool.discard()
    assert not (tmp_path / "pools/p").exists()
    pool.prepare()
    (tmp_path / "pools/p/foreign").touch()
    pool.discard()
    assert (tmp_path / "pools/p/foreign").exists()


def test_a_pools_directory_is_on_stable_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name was not: after a power cut the volumes' files were, in a directory that was not there."""
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "a" / "b"
    open_pool(record("file", path, managed=True)).prepare()
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_a_given_directory_stays(tmp_path: Path, memory_dir: Path) -> None:
    (tmp_path / "mine").mkdir()
    for kind, path in (("file", tmp_path / "mine"), ("memory", memory_dir)):
        pool = open_pool(record(kind, path))
        pool.prepare()
        pool.discard()
        assert path.is_dir()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_lost_or_cut_backing_is_a_failed_volume(kind: str, memory_dir: Path) -> None:
    pool = open_pool(record(kind, memory_dir))
    pool.create_backing(volume())
    os.truncate(memory_dir / "v.raw", 4 * MIB)
    for look in (pool.check_backing, partial(pool.restore_backing, new_boot=True)):
        with pytest.raises(FailedError, match="has 4194304 bytes instead of 8388608"):
            look(volume())
    (memory_dir / "v.raw").unlink()
    with pytest.raises(FailedError, match="cannot be read"):
        pool.check_backing(volume())
    assert pool.allocated(volume()) is None


def test_capacity_counts_provisioned_sizes(tmp_path: Path) -> None:
    pool = open_pool(replace(record("file", tmp_path), capacity=16 * MIB))
    pool.admit(8 * MIB, [volume("a")], new=True)
    with pytest.raises(NoSpaceError, match=r"'p' has 8 MiB left of 16 MiB"):
        pool.admit(8 * MIB + 512, [volume("a")], new=True)
    with pytest.raises(NoSpaceError, match="has 0 B left"):
        pool.admit(512, [volume("a"), volume("b", 12 * MIB)], new=False)


def test_a_volume_larger_than_the_free_filesystem_is_refused(tmp_path: Path) -> None:
    pool = open_pool(record("file", tmp_path))
    free = pool.usage().free
    assert free
    with pytest.raises(NoSpaceError, match="filesystem under"):
        pool.admit(free + (1 << 40), [], new=True)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_failure_while_making_leaves_no_file(
    kind: str, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pool = open_pool(record(kind, memory_dir))
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        patched.setattr(os, "ftruncate", full)
        with pytest.raises(NoSpaceError, match="No space left"):
            pool.create_backing(volume())
    assert list(memory_dir.iterdir()) == []
    pool.create_backing(volume())

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", broken)
        with pytest.raises(StorageError, match="Input/output error"):
            pool.resize_backing(volume(), 16 * MIB)
    assert (memory_dir / "v.raw").stat().st_size == 8 * MIB


@pytest.mark.parametrize("path", [None, "relative/path"])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_pool_needs_an_absolute_path(kind: str, path: str | None) -> None:
    with pytest.raises(InvalidError, match="absolute path"):
        open_pool(record(kind, path))


# memory


def test_a_memory_volume_takes_its_memory_at_once(memory_dir: Path) -> None:
    pool = open_pool(record("memory", memory_dir))
    pool.prepare()
    pool.create_backing(volume())
    assert pool.allocated(volume()) == 8 * MIB
    pool.resize_backing(volume(), 12 * MIB)
    assert pool.allocated(volume()) == 12 * MIB
    assert pool.backend(volume())["path"] == str(memory_dir / "v.raw")


def test_memory_content_outlives_the_gateway_but_not_the_host(memory_dir: Path) -> None:
    path = memory_dir / "pool"
    pool = open_pool(record("memory", path, managed=True))
    pool.prepare()
    pool.create_backing(volume())
    (path / "v.raw").write_bytes(b"x" * 8 * MIB)
    assert pool.restore_backing(volume(), new_boot=True) is None
    assert (path / "v.raw").read_bytes() == b"x" * 8 * MIB
    # A restart without tmpfs where the pool was is no reason to fill the disk that is there instead.
    if host.filesystem_type(Path("/tmp")) != "tmpfs":
        elsewhere = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/tmp"))
        with pytest.raises(FailedError, match="not in memory"):
            open_pool(record("memory", elsewhere)).restore_backing(volume(), new_boot=True)
        assert list(elsewhere.iterdir()) == []
        elsewhere.rmdir()
    # After a restart of the host even the directory is gone.
    shutil.rmtree(path)
    notice = pool.restore_backing(volume(), new_boot=True)
    assert notice is not None
    assert "content of volume 'v' is gone" in notice
    assert (path / "v.raw").read_bytes() == bytes(8 * MIB)


def test_a_memory_pool_is_in_memory(tmp_path: Path) -> None:
    if host.filesystem_type(tmp_path) == "tmpfs":
        pytest.skip("the temporary directory is in memory here")
    pool = open_pool(record("memory", tmp_path / "p", managed=True))
    with pytest.raises(InvalidError, match="not in memory"):
        pool.prepare()
    assert not (tmp_path / "p").exists()


def test_more_memory_than_the_host_has_is_refused(memory_dir: Path) -> None:
    pool = open_pool(record("memory", memory_dir))
    with pytest.raises(NoSpaceError, match="of memory free"):
        pool.admit(host.available_memory() + (1 << 40), [], new=True)


def test_the_default_path_is_named_after_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_path("fast", huge=False) == "/dev/shm/ringstone-fast"
    monkeypatch.setattr("ringstone.pools.memory.hugetlbfs_mounts", lambda: [Path("/dev/hugepages")])
    assert default_path("fast", huge=True) == "/dev/hugepages/ringstone-fast"
    monkeypatch.setattr("ringstone.pools.memory.hugetlbfs_mounts", list)
    with pytest.raises(NoDeviceError, match="mount -t hugetlbfs"):
        default_path("fast", huge=True)


def test_hugetlbfs_backings_are_whole_pages(memory_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic only: pages of 2 MiB cannot be had on every machine."""
    monkeypatch.setattr("ringstone.pools.memory.filesystem_type", lambda path: "hugetlbfs")
    real = os.statvfs(memory_dir)
    fields = [2 * MIB, *real[1:]]
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    monkeypatch.setattr(
        "ringstone.pools.memory.huge_pages", lambda size: host.HugePages(page_size=size, free=3, total=8)
    )
    pool = open_pool(record("memory", memory_dir))
    assert pool.usage() == type(pool.usage())(16 * MIB, 6 * MIB)
    pool.admit(5 * MIB, [], new=True)
    with pytest.raises(NoSpaceError):
        pool.admit(6 * MIB + 512, [], new=True)
    pool.create_backing(volume(size=3 * MIB))
    assert (memory_dir / "v.raw").stat().st_size == 4 * MIB


# device


def test_a_device_is_one_volume_of_its_size(loop_device: str) -> None:
    pool = open_pool(record("file", loop_device))
    assert isinstance(pool, DevicePool)
    pool.prepare()
    assert (pool.default_size(), pool.usage().total) == (16 * MIB, 16 * MIB)
    pool.admit(16 * MIB, [], new=True)
    with pytest.raises(NoSpaceError, match="has 16 MiB, 0 B of it in use"):
        pool.admit(16 * MIB + 512, [], new=True)
    with pytest.raises(BusyError, match="holds volume 'v' already"):
        pool.admit(512, [volume()], new=True)
    pool.admit(8 * MIB, [volume()], new=False)
    with pytest.raises(NoSpaceError, match="8 MiB of it in use"):
        pool.admit(8 * MIB + 512, [volume()], new=False)
    assert pool.backend(volume()) == {"type": "file", "path": loop_device, "direct": "auto"}


def test_a_device_that_is_too_small_now_is_a_failed_volume(loop_device: str) -> None:
    pool = open_pool(record("file", loop_device))
    pool.check_backing(volume(size=16 * MIB))
    pool.resize_backing(volume(), 16 * MIB)
    with pytest.raises(NoSpaceError, match="8 MiB more were asked for"):
        pool.resize_backing(volume(size=16 * MIB), 24 * MIB)
    for look in (pool.check_backing, partial(pool.restore_backing, new_boot=True)):
        with pytest.raises(FailedError, match="has 16777216 bytes instead of 33554432"):
            look(volume(size=32 * MIB))


def test_a_device_needs_an_absolute_path() -> None:
    with pytest.raises(InvalidError, match="absolute path"):
        DevicePool(record("file", "loop0"))


def filled(device: str, *, start: int, end: int) -> None:
    with open(device, "r+b") as opened:
        opened.seek(start)
        opened.write(b"x" * (end - start))
        opened.flush()
        os.fsync(opened.fileno())


def bytes_of(device: str) -> bytes:
    with open(device, "rb") as opened:
        return opened.read()


def test_a_new_volume_on_a_device_is_zeroes(loop_device: str) -> None:
    filled(loop_device, start=0, end=16 * MIB)
    pool = open_pool(record("file", loop_device))
    pool.create_backing(volume(size=8 * MIB))
    assert bytes_of(loop_device) == bytes(8 * MIB) + b"x" * 8 * MIB
    filled(loop_device, start=0, end=MIB)
    pool.remove_backing(volume(size=8 * MIB))
    assert bytes_of(loop_device)[:MIB] == b"x" * MIB, "what was deleted by mistake is still there"
    pool.create_backing(volume(size=4 * MIB + 512))
    assert bytes_of(loop_device)[: 4 * MIB + 512] == bytes(4 * MIB + 512)


def test_growth_on_a_device_is_zeroes_and_leaves_the_volume_alone(loop_device: str) -> None:
    pool = open_pool(record("file", loop_device))
    small = volume(size=4 * MIB)
    pool.create_backing(small)
    filled(loop_device, start=0, end=16 * MIB)
    # A guest has it open meanwhile.
    held = os.open(loop_device, os.O_RDONLY | os.O_EXCL)
    try:
        pool.resize_backing(small, 8 * MIB)
        # An undone growth cuts nothing back: the device has its size.
        pool.resize_backing(small, 4 * MIB)
    finally:
        os.close(held)
    assert bytes_of(loop_device) == b"x" * 4 * MIB + bytes(4 * MIB) + b"x" * 8 * MIB


def with_a_partition(device: str) -> None:
    """A partition table of DOS with one partition of Linux, from sector 2048 on."""
    entry = bytes(4) + b"\x83" + bytes(3) + (2048).to_bytes(4, "little") + (1024).to_bytes(4, "little")
    Path(device).write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa")


def with_output_of(*command: str) -> Callable[[str], None]:
    def run(device: str) -> None:
        subprocess.run([*command, device], check=True, capture_output=True)

    return run


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (with_output_of("mkfs.ext4", "-q", "-F"), "ext4"),
        (with_output_of("mkswap"), "swap"),
        (with_a_partition, "dos"),
    ],
    ids=["ext4", "swap", "dos"],
)
def test_a_device_with_a_signature_is_asked_for(
    loop_device: str, fill: Callable[[str], None], named: str
) -> None:
    fill(loop_device)
    before = bytes_of(loop_device)
    pool = open_pool(record("file", loop_device))
    with pytest.raises(ExistsError, match=f"{loop_device} is not empty: it holds .*{named}.*--yes"):
        pool.prepare()
    pool.prepare(erase=True)
    assert bytes_of(loop_device) == before, "nothing is erased before a volume is made"


@pytest.mark.parametrize("at", [4096, 16 * MIB - 512])
def test_a_device_with_data_of_an_unknown_kind_is_asked_for(loop_device: str, at: int) -> None:
    filled(loop_device, start=at, end=at + 512)
    with pytest.raises(ExistsError, match="holds data of an unknown kind"):
        open_pool(record("file", loop_device)).prepare()


def test_a_device_that_somebody_has_open_is_refused(loop_device: str) -> None:
    """QEMU and dd claim nothing, so that the kernel would let us write beside them."""
    pool = open_pool(record("file", loop_device))
    with open(loop_device, "rb") as device, subprocess.Popen(["sleep", "60"], stdin=device) as user:
        try:
            uses: list[Callable[[], None]] = [pool.prepare, lambda: pool.create_backing(volume())]
            for use in uses:
                with pytest.raises(BusyError, match=rf"is open in sleep \(process {user.pid}\)"):
                    use()
        finally:
            user.kill()


def test_a_device_in_use_is_refused(loop_device: str) -> None:
    held = os.open(loop_device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(BusyError, match=loop_device):
            open_pool(record("file", loop_device)).prepare()
        with pytest.raises(BusyError, match=loop_device):
            open_pool(record("file", loop_device)).create_backing(volume())
    finally:
        os.close(held)


def test_two_names_of_one_device_are_one_medium(loop_device: str, tmp_path: Path) -> None:
    link = tmp_path / "by-id"
    link.symlink_to(loop_device)
    assert open_pool(record("file", link)).identity() == open_pool(record("file", loop_device)).identity()


def test_a_missing_device_is_told() -> None:
    pool = open_pool(record("file", "/dev/ringstone-no-such-device"))
    assert isinstance(pool, DevicePool)
    for use in (pool.prepare, pool.usage, lambda: pool.create_backing(volume())):
        with pytest.raises(NoDeviceError, match="no-such-device"):
            use()
    with pytest.raises(FailedError, match="no-such-device"):
        pool.restore_backing(volume(), new_boot=True)


def test_a_character_device_is_no_disk() -> None:
    with pytest.raises(NoDeviceError):
        open_pool(record("file", "/dev/zero")).prepare()


# null and faulty


def test_a_null_volume_has_no_backing() -> None:
    pool = open_pool(record("null", None))
    pool.create_backing(volume(size=1 << 60))
    pool.check_backing(volume())
    assert pool.backend(volume()) == {"type": "null"}
    assert pool.usage().total is None
    with pytest.raises(NoSpaceError):
        open_pool(replace(record("null", None), capacity=MIB)).admit(2 * MIB, [], new=True)


def test_a_faulty_pool_wraps_another(memory_dir: Path) -> None:
    pool = open_pool(record("faulty", memory_dir, inner="memory", seed=7, delay_us=5))
    pool.create_backing(volume())
    assert pool.backend(volume()) == {
        "type": "faulty",
        "inner": {"type": "memory", "path": str(memory_dir / "v.raw"), "hugepages": "auto"},
        "seed": 7,
        "error_per_million": 0,
        "delay_us": 5,
        "torn_per_million": 0,
        "lost_per_million": 0,
    }
    with pytest.raises(InvalidError):
        open_pool(record("faulty", memory_dir, inner="faulty"))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(RingstoneError, match="not a pool type; use memory, file, store, rbd, null"):
        open_pool(record("tape", None))
