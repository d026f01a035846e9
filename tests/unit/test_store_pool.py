"""Store pools over a stand-in for the engine's stores: what is refused, with which words, and what is left behind."""

import errno
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import (
    BusyError,
    DeniedError,
    ExistsError,
    FailedError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    NotFoundError,
    RingstoneError,
    StorageError,
)
from ringstone.pools import DrivePool, KeySource, LayerPool, Sealed, SnapshotPool, Usage, open_pool, store
from ringstone.pools.store import StorePool
from ringstone.state import PoolRecord, VolumeRecord, VolumeState
from tests.unit.store_fake import FakeStore, failure, mark_of, stores

__all__ = ["stores"]

MIB = 1 << 20
BLANK = [bytes(8)] * 2


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch, stores: type[FakeStore]) -> None:
    monkeypatch.setattr("ringstone.pools.store._PASSING_SECONDS", 0.0)
    monkeypatch.setattr("ringstone.pools.occupancy._PASSING_SECONDS", 0.0)


def record(path: Path | str | None, **options: Any) -> PoolRecord:
    return PoolRecord("p", "store", None if path is None else str(path), None, 1, options)


def made(path: Path, **options: Any) -> StorePool:
    """On a new file of 64 MiB, half of it for blocks."""
    pool = StorePool(store.placed(record(path, size=64 * MIB, **options), path.parent))
    pool.prepare()
    return pool


def again(pool: StorePool) -> StorePool:
    return StorePool(pool.record)


def volume(name: str = "v", size: int = 8 * MIB) -> VolumeRecord:
    return VolumeRecord(name, f"id-of-{name}", "p", size, 512, VolumeState.READY, 2)


# made and gone


def test_it_offers_all_that_a_pool_may_offer(tmp_path: Path) -> None:
    pool = open_pool(record(tmp_path / "drive"))
    assert isinstance(pool, SnapshotPool)
    assert isinstance(pool, LayerPool)
    assert isinstance(pool, DrivePool)


def test_a_pool_is_the_store_that_was_made_for_it(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive", extent=16 << 10)
    uuid = FakeStore.look(str(tmp_path / "drive"))
    assert pool.record.options == {"managed": True, "extent": 16 << 10, "uuid": uuid}
    assert pool.identity() == f"store {uuid}"
    assert [one.extent for one in FakeStore.drives.values()] == [16 << 10]
    assert (tmp_path / "drive").stat().st_size == 64 * MIB


def test_its_file_is_on_stable_media_and_so_is_that_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    pool = made(tmp_path / "drive")
    assert synced[-1] == str(tmp_path)
    synced.clear()
    again(pool).discard()
    assert synced == [str(tmp_path / "drive"), str(tmp_path)]


def test_without_a_path_it_is_a_file_of_the_gateway(tmp_path: Path) -> None:
    placed = store.placed(record(None, size=64 * MIB), tmp_path / "pools")
    assert placed.path == str(tmp_path / "pools/p.store")
    assert (tmp_path / "pools").stat().st_mode & 0o777 == 0o700
    with pytest.raises(InvalidError, match="size, for example"):
        StorePool(store.placed(record(None), tmp_path / "pools")).prepare()
    assert list((tmp_path / "pools").iterdir()) == []


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    FakeStore.failures["format"] = failure("no_space", "the filesystem is full")
    with pytest.raises(NoSpaceError, match=r"^The filesystem is full\.$"):
        made(tmp_path / "drive")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/dev/ringstone-no-such-device", "/ringstone/no/such/place"])
def test_what_is_not_there_is_told(path: str) -> None:
    pool = StorePool(record(path, size=64 * MIB))
    with pytest.raises(NoDeviceError, match=f"{path}.*lsblk"):
        pool.prepare()
    with pytest.raises(NoDeviceError, match=f"{path}.*lsblk"):
        pool.check()
    assert pool.identity() is None


@pytest.mark.parametrize("path", [None, "drive"])
def test_it_needs_an_absolute_path(path: str | None) -> None:
    with pytest.raises(InvalidError, match="absolute path"):
        StorePool(record(path))


def test_neither_a_directory_nor_a_character_device_is_a_drive(tmp_path: Path) -> None:
    for path in (str(tmp_path), "/dev/zero"):
        with pytest.raises(NoDeviceError, match="neither a block device nor a file"):
            StorePool(store.placed(record(path), tmp_path)).prepare()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extent": 8 << 10}, "use 16K"),
        ({"extent": 2 << 20}, "use 16K"),
        ({"extent": 96 << 10}, "use 16K"),
        ({"extent": True}, "use 16K"),
        ({"overcommit": 0.5}, "within 1"),
        ({"overcommit": 1001}, "within 1"),
        ({"overcommit": float("nan")}, "within 1"),
        ({"overcommit": "much"}, "no number"),
        ({"size": 0}, "no size"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        StorePool(record("/drive", **options))


def test_a_file_that_is_there_has_its_own_size(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.write_bytes(bytes(MIB))
    with pytest.raises(InvalidError, match="leave the size out"):
        made(drive)
    assert mark_of(drive) == BLANK
    pool = StorePool(store.placed(record(drive), tmp_path))
    pool.prepare()
    assert "managed" not in pool.record.options
    pool.discard()
    assert drive.read_bytes() == bytes(MIB), "a file that was there stays, without the store"


def with_text(drive: Path) -> None:
    drive.write_bytes(b"precious" + bytes(4 * MIB))


def with_a_filesystem(drive: Path) -> None:
    drive.write_bytes(bytes(16 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", str(drive)], check=True, capture_output=True)


def with_a_store(drive: Path) -> None:
    made(drive)


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (with_text, "data of an unknown kind"),
        (with_a_filesystem, "ext4"),
        (with_a_store, "a Ringstone store"),
    ],
)
def test_what_would_be_erased_is_asked_for(tmp_path: Path, fill: Callable[[Path], None], named: str) -> None:
    drive = tmp_path / "drive"
    fill(drive)
    before = drive.read_bytes()
    placed = store.placed(record(drive), tmp_path)
    with pytest.raises(ExistsError, match=rf"it holds {named}.*--yes"):
        StorePool(placed).prepare()
    assert drive.read_bytes() == before
    pool = StorePool(placed)
    pool.prepare(erase=True)
    assert pool.record.options["uuid"] == FakeStore.look(str(drive))
    assert b"precious" not in drive.read_bytes()
    assert subprocess.run(["blkid", str(drive)], check=False).returncode == 2, "no signature is left"


def test_a_file_that_somebody_has_open_is_refused(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.write_bytes(bytes(MIB))
    with drive.open("rb") as opened, subprocess.Popen(["sleep", "60"], stdin=opened) as user:
        try:
            with pytest.raises(BusyError, match=rf"is open in sleep \(process {user.pid}\)"):
                StorePool(store.placed(record(drive), tmp_path)).prepare(erase=True)
        finally:
            user.kill()
    assert mark_of(drive) == BLANK


def test_a_file_with_holes_is_filled(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    drive.touch()
    os.truncate(drive, 4 * MIB)
    StorePool(store.placed(record(drive), tmp_path)).prepare()
    assert drive.stat().st_blocks * 512 >= 4 * MIB


def test_a_file_of_the_pool_goes_with_it(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    again(pool).check()
    again(pool).discard()
    assert list(tmp_path.iterdir()) == []
    assert FakeStore.opened == set()
    again(pool).discard()


def test_a_store_that_is_not_the_pool_s_is_left_alone(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    first = made(drive)
    second = StorePool(store.placed(record(drive), tmp_path))
    second.prepare(erase=True)
    before = drive.read_bytes()
    again(first).discard()
    assert drive.read_bytes() == before
    for use in (again(first).check, again(first).usage, lambda: again(first).backend(volume())):
        with pytest.raises(FailedError, match=r"is not that of pool 'p'.*/dev/disk/by-id"):
            use()
    again(second).check()


def test_a_store_that_is_gone_is_a_failed_pool(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    (tmp_path / "drive").write_bytes(bytes(MIB))
    with pytest.raises(FailedError, match=r"There is no store at .*/drive"):
        again(pool).check()
    assert again(pool).allocated(volume()) is None
    assert again(pool).shared(volume()) is None


def test_a_pool_whose_making_was_cut_short_is_taken_back(tmp_path: Path) -> None:
    """By the record from before it was made: that has no uuid yet."""
    drive = tmp_path / "drive"
    old = made(drive)
    noted = store.placed(record(drive), tmp_path)
    before = drive.read_bytes()
    StorePool(noted).discard()
    assert drive.read_bytes() == before, "it was not begun, so nothing of it is there"
    StorePool(noted).prepare(erase=True)
    StorePool(noted).discard()
    assert mark_of(drive) == BLANK
    again(old).discard()
    # A file, which was made and had no store yet.
    noted = store.placed(record(tmp_path / "new", size=MIB), tmp_path)
    (tmp_path / "new").write_bytes(bytes(MIB))
    StorePool(noted).discard()
    assert not (tmp_path / "new").exists()


def test_a_store_with_an_open_volume_is_not_wiped(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.create_backing(volume())
    FakeStore(str(tmp_path / "drive")).hold("v", open=True)
    with pytest.raises(BusyError, match="is open"):
        again(pool).discard()
    assert mark_of(tmp_path / "drive") != BLANK


# in use


def test_a_store_of_another_process_is_busy_and_not_failed(tmp_path: Path) -> None:
    """A gateway that was killed is waited for; a volume that failed is not."""
    pool = made(tmp_path / "drive")
    pool.create_backing(volume())
    FakeStore.elsewhere.add(str(tmp_path / "drive"))
    for use in (again(pool).check, lambda: again(pool).check_backing(volume())):
        with pytest.raises(BusyError, match="Another process has the store"):
            use()
    assert again(pool).restore_backing(volume(), new_boot=False) is None


def test_a_store_that_is_let_go_of_meanwhile_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = made(tmp_path / "drive")
    pool.create_backing(volume())
    FakeStore.elsewhere.add(str(tmp_path / "drive"))
    monkeypatch.setattr("ringstone.pools.store._PASSING_SECONDS", 60.0)
    monkeypatch.setattr("time.sleep", lambda seconds: FakeStore.elsewhere.clear())
    again(pool).remove_backing(volume())
    with pytest.raises(NotFoundError):
        again(pool).snapshots(volume())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("not_found", NotFoundError),
        ("exists", ExistsError),
        ("busy", BusyError),
        ("in_use", BusyError),
        ("no_space", NoSpaceError),
        ("invalid", InvalidError),
        ("failed", FailedError),
        ("io", StorageError),
        ("from the future", RingstoneError),
    ],
)
def test_the_engine_s_words_are_errors_of_the_family(
    tmp_path: Path, code: str, kind: type[RingstoneError]
) -> None:
    pool = made(tmp_path / "drive")
    FakeStore.failures["create"] = failure(code, "the store is full: 0 bytes are free. Delete volumes")
    with pytest.raises(kind, match=r"^The store is full: 0 bytes are free\. Delete volumes\.$") as raised:
        pool.create_backing(volume())
    assert type(raised.value) is kind


# space


def test_usage_is_what_blocks_have(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.create_backing(volume(size=64 * MIB))
    FakeStore(str(tmp_path / "drive")).written("v", 12 * MIB)
    assert pool.usage() == Usage(32 * MIB, 20 * MIB)
    space = pool.space()
    assert (space.size, space.capacity, space.used, space.free) == (64 * MIB, 32 * MIB, 12 * MIB, 20 * MIB)
    assert (space.promised, space.promised_at_most) == (64 * MIB, 320 * MIB)
    assert again(pool).allocated(volume()) == 12 * MIB
    assert pool.default_size() is None


def test_sizes_may_add_up_to_so_many_times_the_capacity(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive", overcommit=1.5)
    pool.admit(48 * MIB, [], new=True)
    pool.admit(16 * MIB, [volume(size=32 * MIB)], new=False)
    with pytest.raises(
        NoSpaceError, match=r"may have 48 MiB together \(1.5 times the 32 MiB.*They have 32 MiB.*pool grow p"
    ):
        pool.admit(16 * MIB + 512, [volume(size=32 * MIB)], new=True)
    limited = StorePool(replace(pool.record, capacity=8 * MIB))
    with pytest.raises(NoSpaceError, match="has 8 MiB left of 8 MiB"):
        limited.admit(9 * MIB, [], new=True)


def test_a_file_grows_with_its_pool(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.grow(96 * MIB)
    assert pool.space().capacity == 48 * MIB
    assert (tmp_path / "drive").stat().st_blocks * 512 >= 32 * MIB, "what was added is there"
    with pytest.raises(InvalidError, match="cannot shrink"):
        pool.grow(96 * MIB)
    with pytest.raises(InvalidError, match="adds no extent"):
        pool.grow(None)
    # As a device that has become longer.
    os.truncate(tmp_path / "drive", 128 * MIB)
    pool.grow(None)
    assert pool.space().capacity == 64 * MIB


def test_a_file_that_cannot_grow_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = made(tmp_path / "drive")

    def full(fd: int, offset: int, length: int) -> None:
        os.ftruncate(fd, offset + length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match="Choose a smaller size"):
        pool.grow(96 * MIB)
    assert (tmp_path / "drive").stat().st_size == 64 * MIB


# volumes


def test_a_volume_s_life(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.refuse_foreign(volume())
    pool.create_backing(volume())
    with pytest.raises(ExistsError, match="has a volume 'v' that this gateway's state does not know"):
        pool.refuse_foreign(volume())
    with pytest.raises(ExistsError):
        pool.create_backing(volume())
    pool.check_backing(volume())
    assert pool.backend(volume()) == {"type": "store", "path": str(tmp_path / "drive"), "volume": "v"}
    pool.resize_backing(volume(), 16 * MIB)
    pool.check_backing(volume(size=16 * MIB))
    pool.remove_backing(volume())
    pool.remove_backing(volume())
    with pytest.raises(FailedError, match="has no backing"):
        pool.check_backing(volume())


def test_an_undone_growth_leaves_a_longer_backing(tmp_path: Path) -> None:
    """A store cannot cut one back, and need not: what was not written takes nothing."""
    pool = made(tmp_path / "drive")
    pool.create_backing(volume())
    pool.resize_backing(volume(), 16 * MIB)
    pool.resize_backing(volume(), 8 * MIB)
    pool.check_backing(volume())
    pool.resize_backing(volume(), 12 * MIB)
    assert [one["size"] for one in FakeStore.commands if "size" in one] == [8 * MIB, 16 * MIB]
    with pytest.raises(FailedError, match=f"has {16 * MIB} bytes in the store"):
        pool.check_backing(volume(size=32 * MIB))


def test_one_volume_asks_the_store_for_no_list(tmp_path: Path) -> None:
    """At a start each attached volume asked for all of them."""
    pool = made(tmp_path / "drive")
    for name in ("a", "b"):
        pool.create_backing(volume(name))
    FakeStore.commands.clear()
    alone = again(pool)
    alone.check_backing(volume("a"))
    assert (alone.allocated(volume("a")), alone.snapshots(volume("a"))) == (0, [])
    assert FakeStore.commands == [{"name": "a"}]


def test_a_list_of_volumes_asks_the_store_once(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    names = [f"v{number}" for number in range(10)]
    for name in names:
        pool.create_backing(volume(name))
    FakeStore.commands.clear()
    for name in names:
        pool.check_backing(volume(name))
        assert (pool.allocated(volume(name)), pool.shared(volume(name))) == (0, 0)
    assert FakeStore.commands == [{"name": "v0"}, {"name": None}]
    # What is changed through it is seen.
    pool.create_snapshot(volume("v0"), "monday")
    assert pool.shared(volume("v0")) == 4096


# snapshots


def test_snapshots_and_what_is_made_of_them(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.create_backing(volume())
    pool.create_snapshot(volume(), "monday")
    pool.resize_backing(volume(), 16 * MIB)
    pool.create_snapshot(volume(), "tuesday")
    assert [(one.name, one.size, one.own) for one in pool.snapshots(volume())] == [
        ("monday", 8 * MIB, 4096),
        ("tuesday", 16 * MIB, 4096),
    ]
    with pytest.raises(ExistsError):
        pool.create_snapshot(volume(), "monday")
    pool.clone_backing(volume(), "monday", volume("copy"))
    assert (pool.parent(volume("copy")), pool.parent(volume())) == ("v@monday", None)
    with pytest.raises(BusyError, match="clones: copy"):
        pool.remove_snapshot(volume(), "monday")
    with pytest.raises(NotFoundError):
        pool.remove_snapshot(volume(), "sunday")
    pool.flatten(volume("copy"))
    with pytest.raises(InvalidError, match="nothing to copy"):
        pool.flatten(volume("copy"))
    pool.remove_snapshot(volume(), "monday")
    with pytest.raises(BusyError, match="has snapshots"):
        pool.remove_backing(volume())
    pool.revert(volume(), "tuesday")
    pool.clone_running(volume(), volume("now"))
    assert pool.parent(volume("now")) is None


def test_a_group_is_one_command(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.create_backing(volume("a"))
    pool.create_backing(volume("b"))
    pool.create_group_snapshot([volume("a"), volume("b")], "monday")
    assert FakeStore.commands[-1] == {"volumes": ["a", "b"], "name": "monday"}
    pool.remove_snapshot(volume("a"), "monday")
    with pytest.raises(ExistsError):
        pool.create_group_snapshot([volume("a"), volume("b")], "monday")
    assert pool.snapshots(volume("a")) == []


def test_what_changed_is_offsets_and_lengths(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    pool.create_backing(volume())
    FakeStore(str(tmp_path / "drive")).written("v", 3 * MIB)
    assert pool.diff(volume(), None, None) == [(0, 3 * MIB)]
    with pytest.raises(NotFoundError, match="no snapshot"):
        pool.diff(volume(), "monday", None)


# keys


def key_file(path: Path, byte: int) -> KeySource:
    path.write_bytes(bytes([byte]) * 32)
    path.chmod(0o600)
    return KeySource("key_file", str(path))


def test_an_encrypted_volume_needs_a_key_of_the_pool(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive")
    with pytest.raises(InvalidError, match=r"no key.*ringstone pool rekey p --key-file"):
        pool.create_sealed(volume(), integrity=False, encryption=True)
    assert FakeStore(str(tmp_path / "drive")).call('{"op": "list", "name": null}') == '{"volumes": []}'


def test_a_pool_is_not_made_with_a_key_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(RingstoneError, match="Reading the key"):
        made(tmp_path / "drive", key_file=str(tmp_path / "none"))
    assert not (tmp_path / "drive").exists()


def test_only_an_encrypted_volume_is_opened_with_the_key(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive", key_file=key_file(tmp_path / "key", 1).place)
    pool.create_sealed(volume("secret"), integrity=True, encryption=True)
    pool.create_sealed(volume("checked"), integrity=True, encryption=False)
    assert pool.sealed(volume("secret")) == Sealed(integrity=True, encryption=True)
    assert pool.sealed(volume("checked")) == Sealed(integrity=True, encryption=False)
    assert pool.sealed(volume("none")) is None
    assert pool.key(volume("secret")) == bytes([1]) * 32
    (tmp_path / "key").unlink()
    assert again(pool).key(volume("checked")) is None
    with pytest.raises(RingstoneError, match="Reading the key"):
        again(pool).key(volume("secret"))


def test_a_pool_gets_another_key_even_where_that_was_interrupted(tmp_path: Path) -> None:
    old, new = key_file(tmp_path / "old", 1), key_file(tmp_path / "new", 2)
    pool = made(tmp_path / "drive", key_file=old.place, overcommit=2)
    pool.create_sealed(volume(), integrity=False, encryption=True)
    changed = pool.rekey(new)
    assert changed.options == {**pool.record.options, "key_file": new.place}
    # The state did not hear of it, and the old key is gone meanwhile.
    Path(old.place).unlink()
    assert again(pool).rekey(new) == changed
    command = StorePool(replace(pool.record, options={"key_command": "vault"}))
    assert command.rekey(new).options == {"key_file": new.place}


def test_another_key_is_refused_where_that_of_a_volume_is_lost(tmp_path: Path) -> None:
    pool = made(tmp_path / "drive", key_file=key_file(tmp_path / "key", 1).place)
    pool.create_sealed(volume(), integrity=False, encryption=True)
    key_file(tmp_path / "key", 3)
    with pytest.raises(DeniedError, match="another key"):
        pool.rekey(key_file(tmp_path / "new", 2))
    with pytest.raises(DeniedError, match="another key"):
        StorePool(replace(pool.record, options={})).rekey(key_file(tmp_path / "new", 2))
