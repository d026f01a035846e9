"""Store pools in a gateway: made and taken back, grown, watched, and their volumes' snapshots. No store is real."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NoSpaceError,
    StateError,
    StorageError,
    UnsupportedError,
)
from ringstone.gateway.snapshots import Snapshots
from ringstone.gateway.space import WARNED_AT
from ringstone.gateway.undo import UndoLater
from ringstone.pools import Space
from ringstone.state import PoolRecord, SqliteStore, VolumeState
from tests.framework.service import Host, host
from tests.unit.store_fake import FakeStore, failure, stores

__all__ = ["host", "stores"]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _stores(stores: type[FakeStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringstone.pools.store._PASSING_SECONDS", 0.0)


def make(host: Host, name: str = "p", path: Path | None = None, **options: Any) -> PoolRecord:
    if path is None:
        options.setdefault("size", 64 * MIB)
    erase = bool(options.pop("erase", False))
    record = PoolRecord(name, "store", str(path) if path else None, None, 1, options)
    return host.service.pools.create(record, erase=erase)


def store_of(record: PoolRecord) -> FakeStore:
    assert record.path is not None
    return FakeStore(record.path)


def warnings(host: Host) -> list[str]:
    return [one.message for one in host.events.latest(100) if one.level == "warning"]


# pools


def test_a_pool_comes_and_goes_with_its_file(host: Host) -> None:
    record = make(host)
    assert record.path == str(host.root / "pools/p.store")
    assert host.store.pool("p") == record
    assert "uuid" in record.options
    assert not {"size", "replaces"} & record.options.keys()
    host.service.pools.delete("p")
    assert not Path(record.path).exists()
    assert host.store.pools() == []


def test_a_drive_of_a_pool_is_never_taken_for_another(host: Host, tmp_path: Path) -> None:
    """Not even where its content may be lost: nothing is erased before that is known."""
    first = make(host)
    assert first.path is not None
    before = Path(first.path).read_bytes()
    link = tmp_path / "by-id"
    link.symlink_to(first.path)
    for path in (Path(first.path), link):
        with pytest.raises(ExistsError, match="already belongs to pool 'p'"):
            make(host, "q", path, erase=True)
    assert Path(first.path).read_bytes() == before
    assert host.store.pools() == [first]


def test_a_name_that_is_taken_erases_nothing(host: Host, tmp_path: Path) -> None:
    make(host)
    drive = tmp_path / "drive"
    drive.write_bytes(b"precious" * MIB)
    with pytest.raises(ExistsError, match="choose another name"):
        make(host, "p", drive, erase=True)
    assert drive.read_bytes() == b"precious" * MIB


def test_a_pool_that_the_state_refuses_is_taken_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(store: SqliteStore, record: PoolRecord) -> None:
        raise StateError("The database is read-only.")

    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "add_pool", refuse)
        with pytest.raises(StateError):
            make(host)
    assert list((host.root / "pools").iterdir()) == []
    assert FakeStore.opened == set()
    make(host)


class Killed(BaseException):
    """The process ends here."""


def kill(*given: object, **named: object) -> None:
    raise Killed


@contextmanager
def no_undo(*given: object, **named: object) -> Iterator[UndoLater]:
    yield lambda what, undo: None


@pytest.mark.parametrize("given", [False, True], ids=["our file", "their drive"])
@pytest.mark.parametrize(
    "step",
    ["ringstone.pools.store.StorePool._take", "ringstone.pools.store_door.format_store", "add_pool"],
)
def test_a_pool_that_was_cut_short_is_gone_after_a_start(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, given: bool
) -> None:
    drive = tmp_path / "drive"
    old = make(host, "old", drive, size=MIB)
    host.store.remove_pool("old")
    with monkeypatch.context() as patched:
        patched.setattr("ringstone.gateway.pools.undoing", no_undo)
        patched.setattr(f"ringstone.state.SqliteStore.{step}" if step == "add_pool" else step, kill)
        if step.endswith("_take") and not given:
            patched.setattr("ringstone.pools.store.StorePool._make_file", kill)
        with pytest.raises(Killed):
            make(host, path=drive if given else None, erase=True)
    host.crash_and_restart()
    assert host.store.pools() == []
    assert host.levels() == [("warning", "")]
    assert list((host.root / "pools").glob("*")) == []
    # The store of before is whole for as long as the new one was not begun.
    erased = given and not step.endswith("_take")
    assert FakeStore.look(str(drive)) == (None if erased else old.options["uuid"])
    make(host, path=drive, erase=True)


def test_a_deletion_that_was_cut_short_is_finished(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    make(host)
    with monkeypatch.context() as patched:
        patched.setattr("ringstone.pools.store.StorePool.discard", kill)
        with pytest.raises(Killed):
            host.service.pools.delete("p")
    host.crash_and_restart()
    assert list((host.root / "pools").glob("*")) == []
    make(host)


def test_growth_is_told_and_only_where_there_is_a_drive(host: Host) -> None:
    make(host)
    host.service.pools.grow("p", 96 * MIB)
    assert host.events.latest(1)[0].message == "Pool p has grown by 16 MiB."
    host.pool("file", "plain")
    with pytest.raises(UnsupportedError, match="only store pools do"):
        host.service.pools.grow("plain", None)


# space


def test_a_warning_is_given_once_for_each_crossing(host: Host) -> None:
    make(host)

    def use(percent: float) -> int:
        host.service.space.note("p", Space(2000, 1000, int(percent * 10), 0, 10_000, 0))
        return len(warnings(host))

    steps = ((79.9, 0), (80, 1), (80.5, 1), (79, 1), (80, 1), (91, 2), (96, 3), (99, 3), (93.5, 3), (96, 3))
    for percent, expected in steps:
        assert use(percent) == expected, percent
    # Less by more than it wavers: what comes again is told again.
    assert (use(70), use(92)) == (3, 4)
    assert WARNED_AT == (80, 90, 95)
    assert "Pool p is 80 % full: 200 B of 1000 B are free." in warnings(host)[0]
    assert "ringstone pool grow p" in warnings(host)[0]


def test_guests_fill_a_pool_without_asking(host: Host) -> None:
    record = make(host)
    host.service.volumes.create("v", "p", 64 * MIB, 512)
    host.pool("file", "plain")
    host.service.space.look()
    assert warnings(host) == []
    store_of(record).written("v", 31 * MIB)
    host.service.space.look()
    host.service.space.look()
    assert len(warnings(host)) == 1
    # One pool that fails keeps nobody from looking at the others.
    FakeStore.elsewhere.add(str(record.path))
    host.service.space.look()


# volumes


def test_a_volume_is_made_opened_and_deleted(host: Host) -> None:
    record = make(host, overcommit=2)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    host.service.attach("v")
    assert host.engine.backends["v"] == {"type": "store", "path": record.path, "volume": "v"}
    host.service.volumes.resize("v", 32 * MIB)
    with pytest.raises(NoSpaceError, match="2 times the 32 MiB"):
        host.service.volumes.resize("v", 65 * MIB)
    assert host.store.volume("v").size == 32 * MIB
    host.service.detach("v")
    host.service.volumes.delete("v")
    assert FakeStore.drives[str(record.options["uuid"])].volumes == {}


def test_an_interrupted_volume_is_undone_when_its_store_is_free_again(host: Host) -> None:
    record = make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    host.store.set_volume_state("v", VolumeState.CREATING)
    FakeStore.elsewhere.add(str(record.path))
    host.crash_and_restart()
    assert host.levels() == [("error", "v")]
    FakeStore.elsewhere.clear()
    host.crash_and_restart()
    assert host.store.volumes() == []
    assert FakeStore.drives[str(record.options["uuid"])].volumes == {}


def test_a_store_that_a_dead_gateway_still_has_is_waited_for(host: Host) -> None:
    record = make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    host.service.attach("v")
    FakeStore.elsewhere.add(str(record.path))
    host.crash_and_restart()
    assert host.service.waits_for_backings


def test_a_volume_with_snapshots_is_not_half_deleted(host: Host) -> None:
    """It once became `deleting`, and then nobody could delete its snapshots any more."""
    make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    Snapshots(host.service).create("v", "monday")
    with pytest.raises(BusyError, match="snapshot delete v monday"):
        host.service.volumes.delete("v")
    assert host.store.volume("v").state is VolumeState.READY
    Snapshots(host.service).delete("v", "monday")
    host.service.volumes.delete("v")


def test_what_the_medium_refuses_to_delete_is_as_before(host: Host) -> None:
    """An image whose deleted snapshot has clones once was half deleted for as long as they were there."""
    make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    FakeStore.failures["delete"] = failure("busy", "clones need it")
    with pytest.raises(BusyError, match="Clones need it"):
        host.service.volumes.delete("v")
    assert host.store.volume("v").state is VolumeState.READY
    host.service.attach("v")
    host.service.detach("v")
    # What is half deleted by another fault stays that.
    FakeStore.failures["delete"] = failure("io", "the drive cannot be written")
    with pytest.raises(StorageError):
        host.service.volumes.delete("v")
    FakeStore.failures["delete"] = failure("busy", "clones need it")
    with pytest.raises(BusyError, match="Clones need it"):
        host.service.volumes.delete("v")
    assert host.store.volume("v").state is VolumeState.DELETING
    host.service.volumes.delete("v")


# snapshots


def test_a_group_has_a_snapshot_at_one_point(host: Host) -> None:
    make(host)
    for name in ("a", "b", "c"):
        host.service.volumes.create(name, "p", 16 * MIB, 512)
    snapshots = Snapshots(host.service)
    assert snapshots.create("b", "monday", ["a", "b"]).name == "monday"
    assert {"volumes": ["b", "a", "b"], "name": "monday"} in FakeStore.commands
    assert [[one.name for one in snapshots.list(name)] for name in "abc"] == [["monday"], ["monday"], []]
    with pytest.raises(ExistsError):
        snapshots.create("c", "monday", ["a"])
    assert snapshots.list("c") == []
    make(host, "other")
    host.service.volumes.create("far", "other", 16 * MIB, 512)
    with pytest.raises(InvalidError, match="is in pool 'other' and 'a' in 'p'"):
        snapshots.create("a", "tuesday", ["far"])


def test_a_volume_in_use_is_cloned(host: Host) -> None:
    make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 4096)
    host.service.attach("v")
    made = Snapshots(host.service).clone("v", None, "copy")
    assert (made.size, made.block_size, made.state) == (16 * MIB, 4096, VolumeState.READY)
    assert FakeStore.commands[-1] == {"volume": "v", "snapshot": None, "name": "copy"}
    assert host.events.latest(1)[0].message == "Made of volume v."
    with pytest.raises(ExistsError):
        Snapshots(host.service).clone("v", None, "copy")
    FakeStore.failures["clone"] = failure("io", "the drive cannot be written")
    with pytest.raises(StorageError):
        Snapshots(host.service).clone("v", None, "again")
    assert [one.name for one in host.store.volumes()] == ["copy", "v"]


def test_a_clone_takes_no_volume_that_the_state_does_not_know(host: Host) -> None:
    """A gateway that died at that moment would delete it at its next start."""
    record = make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    store_of(record).call('{"op": "create", "name": "theirs", "size": 1048576}')
    with pytest.raises(ExistsError, match="does not know"):
        Snapshots(host.service).clone("v", None, "theirs")
    assert "theirs" in FakeStore.drives[str(record.options["uuid"])].volumes
    assert [one.name for one in host.store.volumes()] == ["v"]


def test_other_pools_say_what_they_have_not(host: Host) -> None:
    host.pool("file")
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    snapshots = Snapshots(host.service)
    for use in (lambda: snapshots.clone("v", None, "copy"), lambda: snapshots.diff("v", None, None)):
        with pytest.raises(UnsupportedError, match="use a store or rbd pool"):
            use()
    assert [one.name for one in host.store.volumes()] == ["v"]


def test_what_changed_is_told(host: Host) -> None:
    record = make(host)
    host.service.volumes.create("v", "p", 16 * MIB, 512)
    store_of(record).written("v", MIB)
    assert list(Snapshots(host.service).diff("v", None, None)) == [(0, MIB)]
