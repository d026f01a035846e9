"""The store of one machine: a SQLite file, write-ahead log, synced at every commit."""

import contextlib
import json
import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringstone.errors import BusyError, ExistsError, NotFoundError, StateError
from ringstone.store.migrations import MIGRATIONS, SCHEMA_VERSION
from ringstone.store.records import AttachmentRecord, PoolRecord, VolumeRecord, VolumeState

log = logging.getLogger("ringstone.gateway")


def _refuse_newer(path: Path, schema: int) -> None:
    if schema > SCHEMA_VERSION:
        raise StateError(
            f"The state database {path} has schema {schema}, and this Ringstone knows up to "
            f"{SCHEMA_VERSION}. Install the newer Ringstone again, or use another state directory."
        )


class SqliteStore:
    """Implements ringstone.store.Store. One connection, used by one thread at a time under a lock."""

    def __init__(self, path: Path) -> None:
        """Open or make the database at `path` and bring it to this version's schema; StateError when it
        cannot be."""
        self._path = path
        self._lock = threading.RLock()
        self._depth = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except sqlite3.Error as error:
            self._db.close()
            raise self._unusable(error) from error
        except BaseException:
            self._db.close()
            raise

    @staticmethod
    def check(path: Path) -> None:
        """StateError when this release could not use the database at `path`; it is left as it is."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                row = database.execute("SELECT version FROM schema_version").fetchone()
        except sqlite3.Error as error:
            raise StateError(f"The state database {path} cannot be read: {error}.") from error
        _refuse_newer(path, int(row[0]) if row else 0)

    def _unusable(self, error: sqlite3.Error) -> StateError:
        return StateError(
            f"The state database {self._path} cannot be used: {error}. "
            "Check the disk and the file's permissions, or restore it from a backup."
        )

    def _keep_a_copy(self) -> None:
        """Of a database that is about to get a newer schema, for whoever goes back to the release before."""
        try:
            row = self._db.execute("SELECT version FROM schema_version").fetchone()
        except sqlite3.OperationalError:
            return  # a new database
        version = int(row["version"]) if row else 0
        if not 0 < version < SCHEMA_VERSION:
            return
        copy = self._path.with_name(f"{self._path.name}.schema{version}")
        copy.unlink(missing_ok=True)
        self._db.execute("VACUUM INTO ?", (str(copy),))
        log.warning(
            "The state database gets schema %d; a copy with schema %d, for the release before, is %s.",
            SCHEMA_VERSION,
            version,
            copy,
        )

    def _migrate(self) -> None:
        self._keep_a_copy()
        with self.transaction():
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS schema_version (one INTEGER PRIMARY KEY CHECK (one = 1), version "
                "INTEGER) STRICT"
            )
            row = self._db.execute("SELECT version FROM schema_version").fetchone()
            version = int(row["version"]) if row else 0
            _refuse_newer(self._path, version)
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute("INSERT OR REPLACE INTO schema_version VALUES (1, ?)", (SCHEMA_VERSION,))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock:
            if self._depth == 0:
                # IMMEDIATE: what is read inside stays true until the commit.
                self._begin()
            self._depth += 1
            try:
                yield
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._db.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                self._commit()

    def _begin(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _commit(self) -> None:
        try:
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            # A failed COMMIT may leave the transaction open; the next one must not inherit it.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._unusable(error) from error

    def _all(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def _change(self, sql: str, *values: object) -> int:
        """Rows changed. Constraint violations pass to the caller, who knows what they mean."""
        with self.transaction():
            try:
                return self._db.execute(sql, values).rowcount
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def pools(self) -> list[PoolRecord]:
        return [_pool(row) for row in self._all("SELECT * FROM pools ORDER BY name")]

    def pool(self, name: str) -> PoolRecord:
        rows = self._all("SELECT * FROM pools WHERE name = ?", name)
        if not rows:
            raise NotFoundError(f"There is no pool {name!r}; `ringstone pool list` shows those there are.")
        return _pool(rows[0])

    def add_pool(self, pool: PoolRecord) -> None:
        try:
            self._change(
                "INSERT INTO pools (name, type, path, capacity, options, created_ns) VALUES (?, ?, ?, ?, ?, "
                "?)",
                pool.name,
                pool.type,
                pool.path,
                pool.capacity,
                json.dumps(pool.options),
                pool.created_ns,
            )
        except sqlite3.IntegrityError as error:
            raise ExistsError(f"A pool {pool.name!r} exists already; choose another name.") from error

    def remove_pool(self, name: str) -> None:
        try:
            removed = self._change("DELETE FROM pools WHERE name = ?", name)
        except sqlite3.IntegrityError as error:
            raise BusyError(f"Pool {name!r} still has volumes; delete them first.") from error
        if not removed:
            self.pool(name)

    def volumes(self, pool: str | None = None) -> list[VolumeRecord]:
        if pool is None:
            rows = self._all("SELECT * FROM volumes ORDER BY name")
        else:
            rows = self._all("SELECT * FROM volumes WHERE pool = ? ORDER BY name", pool)
        return [_volume(row) for row in rows]

    def volume(self, name: str) -> VolumeRecord:
        rows = self._all("SELECT * FROM volumes WHERE name = ?", name)
        if not rows:
            raise NotFoundError(
                f"There is no volume {name!r}; `ringstone volume list` shows those there are."
            )
        return _volume(rows[0])

    def add_volume(self, volume: VolumeRecord) -> None:
        with self.transaction():
            self.pool(volume.pool)
            try:
                self._change(
                    "INSERT INTO volumes (name, id, pool, size, block_size, state, created_ns) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    volume.name,
                    volume.id,
                    volume.pool,
                    volume.size,
                    volume.block_size,
                    volume.state.value,
                    volume.created_ns,
                )
            except sqlite3.IntegrityError as error:
                raise ExistsError(f"A volume {volume.name!r} exists already; choose another name.") from error

    def set_volume_state(self, name: str, state: VolumeState) -> None:
        if not self._change("UPDATE volumes SET state = ? WHERE name = ?", state.value, name):
            self.volume(name)

    def set_volume_size(self, name: str, size: int) -> None:
        if not self._change("UPDATE volumes SET size = ? WHERE name = ?", size, name):
            self.volume(name)

    def remove_volume(self, name: str) -> None:
        try:
            removed = self._change("DELETE FROM volumes WHERE name = ?", name)
        except sqlite3.IntegrityError as error:
            raise BusyError(
                f"Volume {name!r} is attached; run `ringstone volume detach {name}` first."
            ) from error
        if not removed:
            self.volume(name)

    def attachments(self) -> list[AttachmentRecord]:
        return [_attachment(row) for row in self._all("SELECT * FROM attachments ORDER BY volume")]

    def attachment(self, volume: str) -> AttachmentRecord | None:
        rows = self._all("SELECT * FROM attachments WHERE volume = ?", volume)
        return _attachment(rows[0]) if rows else None

    def add_attachment(self, attachment: AttachmentRecord) -> None:
        with self.transaction():
            self.volume(attachment.volume)
            held = self.attachment(attachment.volume)
            if held is not None:
                raise ExistsError(
                    f"Volume {held.volume!r} is already attached at {held.socket}; "
                    f"run `ringstone volume detach {held.volume}` first to attach it elsewhere."
                )
            try:
                self._change(
                    "INSERT INTO attachments (volume, socket, queues, read_only, created_ns) VALUES (?, ?, "
                    "?, ?, ?)",
                    attachment.volume,
                    attachment.socket,
                    attachment.queues,
                    int(attachment.read_only),
                    attachment.created_ns,
                )
            except sqlite3.IntegrityError as error:
                raise ExistsError(
                    f"Another volume is attached at {attachment.socket}; choose another socket."
                ) from error

    def remove_attachment(self, volume: str) -> None:
        if not self._change("DELETE FROM attachments WHERE volume = ?", volume):
            self.volume(volume)
            raise NotFoundError(f"Volume {volume!r} is not attached; there is nothing to detach.")

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _pool(row: sqlite3.Row) -> PoolRecord:
    return PoolRecord(
        name=row["name"],
        type=row["type"],
        path=row["path"],
        capacity=row["capacity"],
        created_ns=row["created_ns"],
        options=json.loads(row["options"]),
    )


def _volume(row: sqlite3.Row) -> VolumeRecord:
    return VolumeRecord(
        name=row["name"],
        id=row["id"],
        pool=row["pool"],
        size=row["size"],
        block_size=row["block_size"],
        state=VolumeState(row["state"]),
        created_ns=row["created_ns"],
    )


def _attachment(row: sqlite3.Row) -> AttachmentRecord:
    return AttachmentRecord(
        volume=row["volume"],
        socket=row["socket"],
        queues=row["queues"],
        read_only=bool(row["read_only"]),
        created_ns=row["created_ns"],
    )
