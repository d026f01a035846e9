"""A lock per name, so that work on one volume never waits for work on another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class NamedLocks:
    """Locks made on demand and forgotten when nobody holds or waits for them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        with self._guard:
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
                else:
                    self._locks[name] = (lock, users - 1)

    def users(self, name: str) -> int:
        """How many hold or wait for `name` now."""
        with self._guard:
            return self._locks[name][1] if name in self._locks else 0
