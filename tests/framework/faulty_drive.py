"""A directory on a drive that fails as it is told: some requests or all of them fail, wait, or find the drive gone. A
store on a file there meets faults of its journal, of its table and of blocks.

`python -m tests.framework.faulty_drive MOUNT CONTENT` serves it; it has the commands of tests.framework.volatile too.
"""

import errno
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mfusepy

from tests.framework.volatile import VolatileDirectory, VolatileFilesystem, main

WRITE, READ, SYNC = "write", "read", "sync"


class FaultyFilesystem(VolatileFilesystem):
    """Requests that are held have a thread each."""

    def __init__(self, content: Path) -> None:
        super().__init__(content)
        self._changed = threading.Condition()
        # What fails: the kind of request, and the bytes from and up to which it touches.
        self._failing: list[tuple[str, int, int]] = []
        self._gone = False
        self._holds = False
        self._met = 0

    def command(self, line: str) -> str:
        what, *values = line.split()
        with self._changed:
            if what == "fail":
                self._failing.append((values[0], int(values[1]), int(values[2])))
            elif what == "gone":
                self._gone = True
            elif what == "hold":
                self._holds = True
            elif what == "heal":
                self._failing.clear()
                self._gone = self._holds = False
                self._changed.notify_all()
            elif what == "met":
                return str(self._met)
            else:
                return super().command(line)
        return "done"

    def _meet(self, kind: str, offset: int, length: int) -> None:
        """FuseOSError if a request is to fail; returns when it may be carried out."""
        with self._changed:
            failing = any(
                kind == one and offset < end and begin < offset + length for one, begin, end in self._failing
            )
            if self._gone or failing or self._holds:
                self._met += 1
            while self._holds:
                self._changed.wait()
            if self._gone or failing:
                raise mfusepy.FuseOSError(errno.EIO)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._meet(READ, offset, size)
        return super().read(path, size, offset, fh)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._meet(WRITE, offset, len(data))
        return super().write(path, data, offset, fh)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._meet(SYNC, 0, 1)
        return super().fsync(path, datasync, fh)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        # The node of a device that is gone is gone too.
        if self._gone and path != "/" and fh is None:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return super().getattr(path, fh)


class FaultyDirectory(VolatileDirectory):
    """One that is mounted at `path` while the `with` block runs."""

    _module = "tests.framework.faulty_drive"

    def fail(self, kind: str, begin: int = 0, end: int = sys.maxsize) -> None:
        """Requests of that kind that touch these bytes fail, with EIO."""
        self.ask(f"fail {kind} {begin} {end}")

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Pulled out, until the `with` block is left."""
        self.ask("gone")
        yield
        self.heal()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is answered, until the `with` block is left."""
        self.ask("hold")
        try:
            yield
        finally:
            # Or nobody could unmount it.
            self.heal()

    def heal(self) -> None:
        self.ask("heal")

    def met(self) -> int:
        """How many requests failed or were held."""
        return int(self.ask("met"))


if __name__ == "__main__":
    main(*sys.argv[1:], kind=FaultyFilesystem, nothreads=False)
