"""The SQLite store by itself: its file, its schema, and what a crash or an older version leaves. What every store does
is in tests/functional/test_state_kinds.py."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import StateError
from ringstone.state import AttachmentRecord, PoolRecord, SqliteStore, VolumeRecord, VolumeState
from ringstone.state import sqlite as sqlite_store
from ringstone.state.migrations import MIGRATIONS, SCHEMA_VERSION

POOL = PoolRecord("p", "file", "/pool", 1 << 30, 1, {"direct": "auto"})
VOLUME = VolumeRecord("v", "0f0e0d0c-0b0a-4908-8706-050403020100", "p", 1 << 20, 512, VolumeState.READY, 2)
OWNED = replace(VOLUME, epoch=1)
ATTACHMENT = AttachmentRecord("v", "/run/v.sock", 4, True, 3, epoch=1, client={"cookie": 7})


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
    store.claim(ATTACHMENT)


def test_everything_comes_back_after_reopening(path: Path) -> None:
    first = SqliteStore(path)
    filled(first)
    first.close()
    second = SqliteStore(path)
    assert (second.pools(), second.volumes(), second.attachments()) == ([POOL], [OWNED], [ATTACHMENT])
    assert (second.pool("p"), second.volume("v"), second.attachment("v")) == (POOL, OWNED, ATTACHMENT)
    second.close()


def test_commits_are_synced(store: SqliteStore) -> None:
    # 2 is FULL: sqlite.org/pragma.html#pragma_synchronous.
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_the_serial_is_the_first_20_digits_of_the_id() -> None:
    assert VOLUME.serial == "0f0e0d0c0b0a49088706"


def test_a_transaction_keeps_other_threads_out(store: SqliteStore) -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        inside.wait()
        seen.append(len(store.pools()))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def step() -> None:
        store.add_pool(POOL)
        inside.set()
        # The other thread cannot have read yet: it needs what this one holds.
        assert not seen
        store.add_pool(replace(POOL, name="q"))

    store.transact(step)
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
        *__import__("ringstone.state.migrations", fromlist=["MIGRATIONS"]).MIGRATIONS,
        ("ALTER TABLE pools ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue'",),
    )
    monkeypatch.setattr("ringstone.state.sqlite.MIGRATIONS", steps)
    monkeypatch.setattr("ringstone.state.sqlite.SCHEMA_VERSION", len(steps))
    for _ in range(2):
        store = SqliteStore(path)
        assert store.volumes() == [OWNED]
        assert store._db.execute("SELECT colour FROM pools").fetchone()["colour"] == "blue"
        store.close()


def test_an_interrupted_migration_leaves_the_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SqliteStore(path).close()
    broken = ("CREATE TABLE half (x INTEGER)", "THIS IS NO SQL")
    monkeypatch.setattr("ringstone.state.sqlite.MIGRATIONS", (*MIGRATIONS, broken))
    monkeypatch.setattr("ringstone.state.sqlite.SCHEMA_VERSION", SCHEMA_VERSION + 1)
    with pytest.raises(StateError):
        SqliteStore(path)
    reader = sqlite3.connect(path)
    assert reader.execute("SELECT version FROM schema_version").fetchone() == (SCHEMA_VERSION,)
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
    assert (old.pools(), old.volumes(), old.attachments()) == ([POOL], [OWNED], [ATTACHMENT])
    old.close()


def test_the_state_of_a_lone_machine_goes_on_with_owners(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema 1 knew neither hosts nor epochs."""
    with monkeypatch.context() as past:
        past.setattr(sqlite_store, "MIGRATIONS", MIGRATIONS[:1])
        past.setattr(sqlite_store, "SCHEMA_VERSION", 1)
        SqliteStore(path).close()
    writer = sqlite3.connect(path)
    writer.execute("INSERT INTO pools VALUES ('p', 'file', '/pool', NULL, '{}', 1)")
    writer.execute("INSERT INTO volumes VALUES ('v', 'an id', 'p', 512, 512, 'ready', 2)")
    writer.execute("INSERT INTO attachments VALUES ('v', '/run/v.sock', 4, 0, 3)")
    writer.commit()
    writer.close()
    store = SqliteStore(path)
    assert store.pools() == [PoolRecord("p", "file", "/pool", None, 1, host="localhost")]
    assert store.attachments() == [AttachmentRecord("v", "/run/v.sock", 4, False, 3, "localhost", 0)]
    store.remove_attachment("v", epoch=0)
    assert store.claim(ATTACHMENT).attachment.epoch == 1
    store.close()


def test_a_lone_host_that_is_renamed_keeps_all_it_had(store: SqliteStore) -> None:
    store.add_pool(replace(POOL, host="localhost"))
    store.add_pool(replace(POOL, name="shared"))
    store.add_volume(VOLUME)
    store.claim(ATTACHMENT)
    store.rename_host("alpha")
    assert [pool.host for pool in store.pools()] == ["alpha", None]
    assert [one.host for one in store.attachments()] == ["alpha"]
