"""The store of one machine: a SQLite file, write-ahead log, synced at every commit."""

import contextlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from ringstone.errors import ExistsError, StateError
from ringstone.state.codec import all_fields, from_plain
from ringstone.state.migrations import MIGRATIONS, SCHEMA_VERSION
from ringstone.state.records import HOSTS, AliveRecord, Change, HostRecord, Kind, R, differences
from ringstone.state.rules import Rules

log = logging.getLogger("ringstone.gateway")

T = TypeVar("T")

# Columns whose values are JSON texts, and those whose 0 and 1 are booleans.
_JSON = frozenset({"options", "client", "addresses", "cores"})
_BOOLEAN = frozenset({"read_only", "ha"})


def _refuse_newer(path: Path, schema: int) -> None:
    if schema > SCHEMA_VERSION:
        raise StateError(
            f"The state database {path} has schema {schema}, and this Ringstone knows up to "
            f"{SCHEMA_VERSION}. Install the newer Ringstone again, or use another state directory."
        )


class SqliteStore(Rules):
    """Implements ringstone.state.Store. One connection, used by one thread at a time under a lock."""

    def __init__(self, path: Path) -> None:
        """Open or make the database at `path` and bring it to this version's schema; StateError when it
        cannot be."""
        self._path = path
        self._lock = threading.RLock()
        self._depth = 0
        self._changed = threading.Condition()
        self._commits = 0
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
        with self._transaction():
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
    def _transaction(self) -> Iterator[None]:
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
        with self._changed:
            self._commits += 1
            self._changed.notify_all()

    def transact(self, step: Callable[[], T]) -> T:
        """Others wait meanwhile, so `step` is run once."""
        with self._transaction():
            return step()

    def _execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, values)
        except sqlite3.IntegrityError as error:
            # The rules have looked already; what is left is an id that is not unique.
            raise ExistsError(
                f"The state database refuses a record: {error}. Give it a name and an id of its own."
            ) from error
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _select(self, kind: Kind[R], where: str = "", *values: object) -> list[R]:
        # A lone host needs no lease.
        if kind.record is AliveRecord:
            columns, table = "name AS host, id", HOSTS.name
        else:
            columns, table = ", ".join(field.name for field in fields(kind.record)), kind.name
        with self._lock:
            rows = self._execute(f"SELECT {columns} FROM {table} {where}", *values).fetchall()
        return [_record(kind, row) for row in rows]

    def _get(self, kind: Kind[R], key: str) -> R | None:
        column = HOSTS.key if kind.record is AliveRecord else kind.key
        found = self._select(kind, f"WHERE {column} = ?", key)
        return found[0] if found else None

    def _list(self, kind: Kind[R]) -> list[R]:
        return self._select(kind, f"ORDER BY {HOSTS.key if kind.record is AliveRecord else kind.key}")

    def _put(self, kind: Kind[R], record: R) -> None:
        row = _row(record)
        rest = ", ".join(f"{column} = excluded.{column}" for column in row if column != kind.key)
        self._execute(
            f"INSERT INTO {kind.name} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))}) "
            f"ON CONFLICT ({kind.key}) DO UPDATE SET {rest}",
            *row.values(),
        )

    def _delete(self, kind: Kind[R], key: str) -> None:
        self._execute(f"DELETE FROM {kind.name} WHERE {kind.key} = ?", key)

    def _at_socket(self, host: str, socket: str) -> str | None:
        with self._lock:
            sql = "SELECT volume FROM attachments WHERE host = ? AND socket = ?"
            row = self._execute(sql, host, socket).fetchone()
        return str(row["volume"]) if row else None

    def announce(self, host: HostRecord, ttl_s: int) -> None:
        self.transact(partial(self._keep_host, host))

    def rename_host(self, name: str) -> None:
        """All that is here is the lone host's, whatever its name was."""

        def step() -> None:
            self._execute("UPDATE hosts SET name = ?1 WHERE name != ?1", name)
            self._execute("UPDATE pools SET host = ?1 WHERE host != ?1", name)
            self._execute("UPDATE attachments SET host = ?1 WHERE host != ?1", name)

        self.transact(step)

    def watch(self, kind: Kind[R]) -> "SqliteWatch[R]":
        return SqliteWatch(self, kind)

    def close(self) -> None:
        with self._lock:
            self._db.close()


class SqliteWatch(Generic[R]):
    """Looks at all records of a kind whenever something was committed, and tells what is new."""

    def __init__(self, store: SqliteStore, kind: Kind[R]) -> None:
        self._store = store
        self._kind: Kind[R] = kind
        self._closed = False

    def __iter__(self) -> Iterator[Change[R]]:
        changed = self._store._changed
        known: dict[str, R] = {}
        seen = -1
        while True:
            with changed:
                while not self._closed and self._store._commits == seen:
                    changed.wait()
                if self._closed:
                    return
                seen = self._store._commits
            now = {self._kind.key_of(record): record for record in self._store._list(self._kind)}
            yield from differences(known, now)
            known = now

    def close(self) -> None:
        with self._store._changed:
            self._closed = True
            self._store._changed.notify_all()


def _row(record: Any) -> dict[str, object]:
    values: dict[str, Any] = all_fields(record)
    return {
        name: json.dumps(value) if name in _JSON else int(value) if name in _BOOLEAN else value
        for name, value in values.items()
    }


def _record(kind: Kind[R], row: sqlite3.Row) -> R:
    return from_plain(
        kind,
        {
            name: json.loads(row[name])
            if name in _JSON
            else bool(row[name])
            if name in _BOOLEAN
            else row[name]
            for name in row.keys()  # noqa: SIM118 (a row iterates over its values)
        },
    )
