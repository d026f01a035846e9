"""The logic of pools over the store: made, deleted, and which of them this host reaches."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ringstone.errors import ExistsError, InvalidError, UnsupportedError
from ringstone.gateway import checks
from ringstone.gateway.events import EventLog
from ringstone.gateway.locks import NamedLocks
from ringstone.gateway.undo import undoing
from ringstone.gateway.unfinished import Unfinished
from ringstone.pools import (
    PUBLIC_TYPES,
    SHARED_TYPES,
    TEST_TYPES,
    DrivePool,
    KeySource,
    LayerPool,
    Pool,
    open_pool,
)
from ringstone.pools.memory import default_path
from ringstone.pools.occupancy import medium
from ringstone.state import PoolRecord, Store
from ringstone.state.records import POOLS
from ringstone.units import format_size


class Pools:
    """Every method may be called from any thread, blocks until done, and raises errors of ringstone.errors."""

    def __init__(
        self,
        store: Store,
        events: EventLog,
        locks: NamedLocks,
        *,
        host: str,
        directory: Path,
        allow_test_pools: bool,
    ) -> None:
        """`directory`: where pools go whose path nobody chose."""
        self._store = store
        self._events = events
        self._locks = locks
        self._host = host
        self._directory = directory
        self._unfinished = Unfinished(directory.with_name("unfinished"), POOLS)
        self._types = PUBLIC_TYPES + TEST_TYPES if allow_test_pools else PUBLIC_TYPES

    def create(self, record: PoolRecord, *, hugepages: bool = False, erase: bool = False) -> PoolRecord:
        """Make a pool of `record`; its path is chosen here when it is None. Option `managed` marks a
        directory that is made with the pool and removed with it. `erase` as for Pool.prepare()."""
        checks.check_name("pool", record.name)
        if record.type not in self._types:
            raise InvalidError(f"{record.type!r} is not a pool type; use {', '.join(PUBLIC_TYPES)}.")
        if hugepages and record.type != "memory":
            raise InvalidError(
                "Only memory pools can be on hugepages; leave hugepages out or make a memory pool."
            )
        with self._locks.hold(f"pool {record.name}"):
            if any(known.name == record.name for known in self._store.pools()):
                raise ExistsError(f"A pool {record.name!r} exists already; choose another name.")
            record = self._placed(
                replace(record, host=None if record.type in SHARED_TYPES else self._host), hugepages
            )
            # Before anything is made, or erased.
            with self._alone_with(record):
                return self._make(record, erase)

    @contextmanager
    def _alone_with(self, record: PoolRecord) -> Iterator[None]:
        """Nobody else makes a pool of the same medium meanwhile. ExistsError when there is one."""
        if record.path is None:
            yield
            return
        with self._locks.hold(f"medium {medium(record.path) or os.path.realpath(record.path)}"):
            self._refuse_shared_medium(open_pool(record))
            yield

    def _make(self, record: PoolRecord, erase: bool) -> PoolRecord:
        pool = open_pool(record)

        def add() -> None:
            self._refuse_shared_medium(pool)
            self._store.add_pool(pool.record)

        with self._unfinished.noted(record), undoing(self._events) as undo_later:
            pool.prepare(erase=erase)
            undo_later("preparing the pool", pool.discard)
            self._store.transact(add)
        self._events.say("info", f"Made {record.type} pool {record.name}.")
        return pool.record

    def _placed(self, record: PoolRecord, hugepages: bool) -> PoolRecord:
        kind = record.options.get("inner", "memory") if record.type == "faulty" else record.type
        if kind in ("null", "rbd"):
            if record.path is not None:
                raise InvalidError(f"{kind} pools are in no directory; leave the path out.")
            return record
        ours = {**record.options, "managed": True}
        if record.path is not None:
            checks.check_absolute("path", record.path)
        if kind == "store":
            from ringstone.pools import store

            return store.placed(record, self._directory)
        if record.path is not None:
            # A directory in memory is gone after a restart of the host and made anew then, so it is made now
            # too.
            made = kind == "memory" and not os.path.lexists(record.path)
            return replace(record, options=ours) if made else record
        if kind == "memory":
            path = default_path(record.name, huge=hugepages)
        else:
            path = str(self._directory / record.name)
        return replace(record, path=path, options=ours)

    def _refuse_shared_medium(self, pool: Pool) -> None:
        mine = _media(pool)
        for other in self._store.pools():
            if other.host == pool.record.host and not mine.isdisjoint(_media(open_pool(other))):
                raise ExistsError(
                    f"{pool.record.path or 'That pool of Ceph'} already belongs to pool {other.name!r}; choose another "
                    f"{'path' if pool.record.path else 'one'}."
                )

    def grow(self, name: str, size: int | None) -> None:
        """Use all of a drive that has become longer; a file is made `size` bytes long first."""
        with self._locks.hold(f"pool {name}"):
            pool = self._with_drive(name, "has nothing to grow; only store pools do")
            before = pool.space().capacity
            pool.grow(size)
            more = format_size(pool.space().capacity - before)
            self._events.say("info", f"Pool {name} has grown by {more}.")

    def rekey(self, name: str, source: KeySource) -> None:
        """Have the key of `source` wrap the keys of the pool's encrypted volumes from here on. Volumes are served
        meanwhile. It may be done again after it was interrupted."""
        with self._locks.hold(f"pool {name}"):
            pool = self.reach(name)
            if not isinstance(pool, LayerPool):
                raise UnsupportedError(
                    f"Pool {name!r} is a {pool.record.type} pool, which encrypts nothing; only store pools do."
                )
            self._store.set_pool_options(name, pool.rekey(source).options)
            self._events.say("info", f"The key of pool {name} is {source} now.")

    def begin_scrub(self, name: str, rate: int) -> None:
        """Have all that is in use of its drive read, `rate` bytes a second. One that runs goes on at that rate."""
        self._with_drive(name, "cannot be scrubbed; only store pools can").begin_scrub(rate)
        self._events.say("info", f"Pool {name} is being scrubbed, {format_size(rate)} a second.")

    def cancel_scrub(self, name: str) -> None:
        """Nothing happens where none runs."""
        self._with_drive(name, "cannot be scrubbed; only store pools can").cancel_scrub()

    def _with_drive(self, name: str, otherwise: str) -> DrivePool:
        pool = self.reach(name)
        if not isinstance(pool, DrivePool):
            raise UnsupportedError(f"Pool {name!r} is a {pool.record.type} pool, which {otherwise}.")
        return pool

    def delete(self, name: str) -> None:
        """BusyError while it has volumes."""
        with self._locks.hold(f"pool {name}"):
            pool = self.reach(name)
            with self._unfinished.noted(pool.record):
                self._store.remove_pool(name)
                pool.discard()
            self._events.say("info", f"Deleted pool {name}.")

    def finish(self) -> None:
        """Take away what is left of pools that a gateway was making or deleting when it died."""
        known = {pool.name for pool in self._store.pools()}
        for record, forget in self._unfinished.left():
            if record.name not in known:
                open_pool(record).discard()
                self._events.say("warning", f"Pool {record.name} was being made or deleted; it is gone.")
            forget()

    def reaches(self, record: PoolRecord) -> bool:
        """Whether this host reaches the pool."""
        return record.host is None or record.host == self._host

    def reach(self, name: str) -> Pool:
        """InvalidError for one of another host."""
        record = self._store.pool(name)
        if not self.reaches(record):
            raise InvalidError(
                f"Pool {name!r} is on host {record.host!r} and this is {self._host!r}; do it on that host."
            )
        return open_pool(record)


def _media(pool: Pool) -> frozenset[str]:
    """What names the pool's medium, in its own words and by its path."""
    path = pool.record.path
    return frozenset(filter(None, (pool.identity(), medium(path) if path else None)))
