"""Warnings before a pool's drive is full: each once, when it is first seen that so much is used."""

import threading
from contextlib import suppress

from ringstone.errors import RingstoneError
from ringstone.gateway.events import EventLog
from ringstone.gateway.pools import Pools
from ringstone.pools import DrivePool, Space
from ringstone.state import PoolRecord, Store
from ringstone.units import format_size

# Percent of the capacity.
WARNED_AT = (80, 90, 95)
# So much less than a warning's must be used before it is given again: a pool that is around it warns once.
_SLACK_PERCENT = 2
# Between two looks. A guest at work fills a per cent of a drive in minutes.
_LOOK_SECONDS = 30.0


class SpaceWatch:
    """Of the pools that have a drive of their own. Safe from any thread."""

    def __init__(self, store: Store, pools: Pools, events: EventLog) -> None:
        self._store = store
        self._pools = pools
        self._events = events
        self._lock = threading.Lock()
        # By pool, what was warned of last.
        self._warned: dict[str, int] = {}
        self._stop = threading.Event()

    def start(self) -> None:
        """Look now and then, on a thread of its own: a drive may be slow."""
        threading.Thread(name="space", target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Does not wait: a look that hangs keeps nobody from the end."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """At all that this host reaches."""
        with suppress(RingstoneError):
            for record in self._store.pools():
                self._look_at(record)

    def _look_at(self, record: PoolRecord) -> None:
        # One that fails is told by the health, and others are looked at all the same.
        with suppress(RingstoneError):
            if self._pools.reaches(record):
                pool = self._pools.reach(record.name)
                if isinstance(pool, DrivePool):
                    self.note(record.name, pool.space())

    def note(self, pool: str, space: Space) -> None:
        """Whoever has asked for the space of a pool."""
        with self._lock:
            before = self._warned.get(pool, 0)
            now = self._level(space, before)
            self._warned[pool] = now
        if now > before:
            self._events.say(
                "warning",
                f"Pool {pool} is {100 * space.used // space.capacity} % full: {format_size(space.free)} of "
                f"{format_size(space.capacity)} are free. When nothing is, writes to blocks that were never written "
                "wait, and then fail. Delete volumes or snapshots, or give the drive more room and run `ringstone "
                f"pool grow {pool}`.",
            )

    def _level(self, space: Space, before: int) -> int:
        reached = max((at for at in WARNED_AT if space.used * 100 >= at * space.capacity), default=0)
        if reached >= before or space.capacity == 0:
            return reached
        # Less than before: stay at what was warned of while it is near.
        near = space.used * 100 > (before - _SLACK_PERCENT) * space.capacity
        return before if near else reached
