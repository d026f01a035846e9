"""The SQLite store: what it keeps, what it refuses, and what a crash or an older version leaves."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import BusyError, ExistsError, NotFoundError, StateError
from ringstone.store import AttachmentRecord, PoolRecord, SqliteStore, VolumeRecord, VolumeState
from ringstone.store import sqlite as sqlite_store
from ringstone.store.migrations import MIGRATIONS, SCHEMA_VERSION

POOL = PoolRecord("p", "file", "/pool", 1 << 30, 1, {"direct": "auto"})
VOLUME = VolumeRecord("v", "0f0e0d0c-0b0a-4908-8706-050403020100", "p", 1 << 20, 512, VolumeState.READY, 2)
ATTACHMENT = AttachmentRecord("v", "/run/v.sock", 4, True, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ringstone.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    yield store
    store.close()


def filled(store: SqliteStore) -> None:
    store.add_pool(POOL)
    store.add_volume(VOLUME)
    store.add_attachment(ATTACHMENT)


def test_everything_comes_back_after_reopening(path: Path) -> None:
    first = SqliteStore(path)
    filled(first)
    first.close()
    second = SqliteStore(path)
    assert (second.pools(), second.volumes(), second.attachments()) == ([POOL], [VOLUME], [ATTACHMENT])
    assert (second.pool("p"), second.volume("v"), second.attachment("v")) == (POOL, VOLUME, ATTACHMENT)
    second.close()


def test_commits_are_synced(store: SqliteStore) -> None:
    # 2 is FULL: sqlite.org/pragma.html#pragma_synchronous.
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_the_serial_is_the_first_20_digits_of_the_id() -> None:
    assert VOLUME.serial == "0f0e0d0c0b0a49088706"


def test_taken_names_are_refused(store: SqliteStore) -> None:
    filled(store)
    with pytest.raises(ExistsError, match="pool 'p' exists"):
        store.add_pool(POOL)
    with pytest.raises(ExistsError, match="volume 'v' exists"):
        store.add_volume(replace(VOLUME, id="another"))
    with pytest.raises(ExistsError, match=r"already attached at /run/v\.sock"):
        store.add_attachment(replace(ATTACHMENT, socket="/run/w.sock"))
    store.add_volume(replace(VOLUME, name="w", id="another"))
    with pytest.raises(ExistsError, match=r"Another volume is attached at /run/v\.sock"):
        store.add_attachment(replace(ATTACHMENT, volume="w"))


def test_what_is_in_use_is_not_removed(store: SqliteStore) -> None:
    filled(store)
    with pytest.raises(BusyError, match="still has volumes"):
        store.remove_pool("p")
    with pytest.raises(BusyError, match="is attached"):
        store.remove_volume("v")
    store.remove_attachment("v")
    store.remove_volume("v")
    store.remove_pool("p")
    assert (store.pools(), store.volumes(), store.attachments()) == ([], [], [])


def test_what_is_not_there_is_not_found(store: SqliteStore) -> None:
    for ask in (
        lambda: store.pool("p"),
        lambda: store.volume("v"),
        lambda: store.remove_pool("p"),
        lambda: store.remove_volume("v"),
        lambda: store.set_volume_size("v", 512),
        lambda: store.set_volume_state("v", VolumeState.READY),
        lambda: store.add_volume(VOLUME),
        lambda: store.add_attachment(ATTACHMENT),
        lambda: store.remove_attachment("v"),
    ):
        with pytest.raises(NotFoundError):
            ask()
    assert store.attachment("v") is None


def test_a_volume_that_is_not_attached_cannot_be_detached(store: SqliteStore) -> None:
    filled(store)
    store.remove_attachment("v")
    with pytest.raises(NotFoundError, match="is not attached"):
        store.remove_attachment("v")


def test_volumes_change_and_are_listed_by_pool(store: SqliteStore) -> None:
    filled(store)
    store.add_pool(replace(POOL, name="q"))
    store.add_volume(replace(VOLUME, name="a", id="another", pool="q"))
    store.set_volume_size("v", 2 << 20)
    store.set_volume_state("v", VolumeState.DELETING)
    assert [volume.name for volume in store.volumes()] == ["a", "v"]
    assert store.volumes("p") == [replace(VOLUME, size=2 << 20, state=VolumeState.DELETING)]


def test_a_failed_transaction_leaves_nothing(store: SqliteStore) -> None:
    with pytest.raises(ExistsError), store.transaction():  # noqa: PT012
        store.add_pool(POOL)
        store.add_volume(VOLUME)
        store.add_pool(POOL)
    assert (store.pools(), store.volumes()) == ([], [])
    filled(store)


def test_a_transaction_keeps_other_threads_out(store: SqliteStore) -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        inside.wait()
        seen.append(len(store.pools()))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with store.transaction():
        store.add_pool(POOL)
        inside.set()
        # The other thread cannot have read yet: it needs what this one holds.
        assert not seen
        store.add_pool(replace(POOL, name="q"))
    done.wait()
    thread.join()
    assert seen == [2]


class FullDisk:
    """A connection whose next COMMIT fails as on a full disk; everything else is the real one."""

    def __init__(self, real: sqlite3.Connection) -> None:
        self._real = real
        self._full = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        if sql == "COMMIT" and self._full:
            self._full = False
            raise sqlite3.OperationalError("database or disk is full")
        return self._real.execute(sql, values)


def test_a_failed_commit_is_told_and_leaves_nothing(store: SqliteStore) -> None:
    real = store._db
    store._db = FullDisk(real)  # type: ignore[assignment]
    with pytest.raises(StateError, match="disk is full"):
        store.add_pool(POOL)
    assert store.pools() == []
    store.add_pool(POOL)
    assert store.pools() == [POOL]
    store._db = real


def test_an_uncommitted_change_is_gone_after_a_crash(path: Path, store: SqliteStore) -> None:
    store.add_pool(POOL)
    store._db.execute("BEGIN IMMEDIATE")
    store._db.execute("DELETE FROM pools")
    reader = sqlite3.connect(path)
    assert reader.execute("SELECT count(*) FROM pools").fetchone() == (1,)
    reader.close()
    store._db.execute("ROLLBACK")


def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    SqliteStore(path).close()
    writer = sqlite3.connect(path)
    writer.execute("UPDATE schema_version SET version = ?", (SCHEMA_VERSION + 1,))
    writer.commit()
    writer.close()
    with pytest.raises(StateError, match=rf"has schema {SCHEMA_VERSION + 1}.*knows up to {SCHEMA_VERSION}"):
        SqliteStore(path)
    reader = sqlite3.connect(path)
    assert reader.execute("SELECT version FROM schema_version").fetchone() == (SCHEMA_VERSION + 1,)
    reader.close()


def test_migrations_run_once_and_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SqliteStore(path)
    filled(first)
    first.close()
    steps = (
        *__import__("ringstone.store.migrations", fromlist=["MIGRATIONS"]).MIGRATIONS,
        ("ALTER TABLE pools ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'",),
    )
    monkeypatch.setattr("ringstone.store.sqlite.MIGRATIONS", steps)
    monkeypatch.setattr("ringstone.store.sqlite.SCHEMA_VERSION", len(steps))
    for _ in range(2):
        store = SqliteStore(path)
        assert store.volumes() == [VOLUME]
        assert store._db.execute("SELECT colour FROM pools").fetchone()["colour"] == "blue"
        store.close()


def test_an_interrupted_migration_leaves_the_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SqliteStore(path).close()
    broken = ("CREATE TABLE half (x INTEGER)", "THIS IS NO SQL")
    monkeypatch.setattr("ringstone.store.sqlite.MIGRATIONS", ((), broken))
    monkeypatch.setattr("ringstone.store.sqlite.SCHEMA_VERSION", 2)
    with pytest.raises(StateError):
        SqliteStore(path)
    reader = sqlite3.connect(path)
    assert reader.execute("SELECT version FROM schema_version").fetchone() == (1,)
    assert reader.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
    reader.close()


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(StateError, match="cannot be used"):
        SqliteStore(path)


def test_a_directory_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be used"):
        SqliteStore(tmp_path / "missing" / "ringstone.db")


def test_a_newer_schema_leaves_a_copy_for_the_release_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever rolls back puts it in place again."""
    first = SqliteStore(path)
    filled(first)
    first.close()
    newer = (*MIGRATIONS, ("ALTER TABLE pools ADD COLUMN colour TEXT",))
    with monkeypatch.context() as future:
        future.setattr(sqlite_store, "MIGRATIONS", newer)
        future.setattr(sqlite_store, "SCHEMA_VERSION", len(newer))
        SqliteStore.check(path)
        second = SqliteStore(path)
        assert [pool.name for pool in second.pools()] == ["p"]
        second.close()
    with pytest.raises(StateError, match=f"schema {len(newer)}"):
        SqliteStore.check(path)
    copy = path.with_name(f"{path.name}.schema{SCHEMA_VERSION}")
    SqliteStore.check(copy)
    old = SqliteStore(copy)
    assert (old.pools(), old.volumes(), old.attachments()) == ([POOL], [VOLUME], [ATTACHMENT])
    old.close()
