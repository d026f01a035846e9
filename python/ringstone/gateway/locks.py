"""A lock per name, so that work on one volume never waits for work on another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ringstone.errors import BusyError


class NamedLocks:
    """Locks made on demand and forgotten when nobody holds or waits for them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._free = threading.Condition(self._guard)
        self._frozen: str | None = None
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def frozen(self, why: str, limit_s: float) -> Iterator[None]:
        """Nobody holds a lock inside: those who do are waited for, and others get a BusyError that says
        `why`. BusyError that names what is still under way after `limit_s`."""
        with self._guard:
            if self._frozen is not None:
                raise BusyError(self._frozen)
            self._frozen = why
            if not self._free.wait_for(lambda: not self._locks, limit_s):
                self._frozen = None
                raise BusyError(
                    f"Changes are still under way after {limit_s:g} s ({', '.join(sorted(self._locks))}); try again "
                    "when they are done."
                )
        try:
            yield
        finally:
            with self._guard:
                self._frozen = None

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        with self._guard:
            if self._frozen is not None:
                raise BusyError(self._frozen)
            lock, users = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[name]
                if users == 1:
                    del self._locks[name]
                    self._free.notify_all()
                else:
                    self._locks[name] = (lock, users - 1)

    def users(self, name: str) -> int:
        """How many hold or wait for `name` now."""
        with self._guard:
            return self._locks[name][1] if name in self._locks else 0
