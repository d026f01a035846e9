"""A directory on a drive that loses what was not flushed: a FUSE filesystem beneath the gateway, which forgets at a
power loss whatever came after the last sync. It is strict: a file's sync makes its content durable, the sync of a
directory what is in it, and neither more.

`python -m tests.framework.volatile MOUNT CONTENT` serves it in the foreground, over what is in CONTENT. A line on
standard input is a command, and is answered with a line.
"""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mfusepy

_PUNCH_HOLE, _ZERO_RANGE, _KEEP_SIZE = 2, 16, 1
_START_SECONDS = 30


class VolatileFilesystem(mfusepy.Operations):  # type: ignore[misc]
    """Everything is done at once, beside how to undo it; a sync drops that."""

    use_ns = True

    def __init__(self, content: Path) -> None:
        self._content = content
        self._lock = threading.Lock()
        # The inode of the file or directory whose sync makes it durable, and how to undo it. In order.
        self._undo: list[tuple[int, Callable[[], None]]] = []
        # To undo by, so never closed: names change.
        self._files: dict[int, int] = {}
        self._trash = 0
        self._syncs = 0
        self._heeds = True

    def command(self, line: str) -> str:
        with self._lock:
            if line == "lose":
                lost = len(self._undo)
                for _, undo in reversed(self._undo):
                    undo()
                self._undo.clear()
                return str(lost)
            if line == "syncs":
                return str(self._syncs)
            if line == "ignore":
                self._heeds = False
                return "ignoring"
            return f"{line!r} is no command"

    # what is in files

    def open(self, path: str, flags: int) -> int:
        return self._open(path)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        with self._lock:
            where = self._at(path)
            os.close(os.open(where, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode))
            self._remember(where.parent, where.unlink)
        return self._open(path)

    def _open(self, path: str) -> int:
        fd = os.open(self._at(path), os.O_RDWR)
        self._files.setdefault(os.fstat(fd).st_ino, os.dup(fd))
        return fd

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        with self._lock:
            self._keep(fh, offset, len(data))
            return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        with self._lock:
            fd = self._files[self._at(path).stat().st_ino] if fh is None else fh
            self._keep(fd, length, max(0, os.fstat(fd).st_size - length))
            os.ftruncate(fd, length)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        if mode not in (0, _PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE | _KEEP_SIZE):
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)
        with self._lock:
            if mode == 0:
                self._keep(fh, offset, 0)
                os.posix_fallocate(fh, offset, size)
                return 0
            within = max(0, min(size, os.fstat(fh).st_size - offset))
            self._keep(fh, offset, within)
            os.pwrite(fh, bytes(within), offset)
        return 0

    def _keep(self, fd: int, offset: int, size: int) -> None:
        """What is there now."""
        status = os.fstat(fd)
        before = os.pread(fd, size, offset)
        mine = self._files[status.st_ino]

        def undo() -> None:
            os.pwrite(mine, before, offset)
            os.ftruncate(mine, status.st_size)

        self._undo.append((status.st_ino, undo))

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        return self._synced(os.fstat(fh).st_ino)

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return self._synced(self._at(path).stat().st_ino)

    def _synced(self, inode: int) -> int:
        with self._lock:
            self._syncs += 1
            if self._heeds:
                self._undo = [entry for entry in self._undo if entry[0] != inode]
        return 0

    # what is in directories

    def mkdir(self, path: str, mode: int) -> int:
        with self._lock:
            where = self._at(path)
            where.mkdir(mode)
            self._remember(where.parent, where.rmdir)
        return 0

    def rmdir(self, path: str) -> int:
        with self._lock:
            where = self._at(path)
            where.rmdir()
            self._remember(where.parent, where.mkdir)
        return 0

    def unlink(self, path: str) -> int:
        self._into_trash(self._at(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        here, there = self._at(old), self._at(new)
        if there.exists():
            self._into_trash(there)
        with self._lock:
            here.rename(there)
            self._remember(there.parent, lambda: os.rename(there, here))
        return 0

    def _into_trash(self, where: Path) -> None:
        with self._lock:
            self._trash += 1
            kept = self._content.with_name(f"{self._content.name}.{self._trash}")
            where.rename(kept)
            self._remember(where.parent, lambda: os.rename(kept, where))

    def _remember(self, directory: Path, undo: Callable[[], None]) -> None:
        self._undo.append((directory.stat().st_ino, undo))

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    # what they are

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.fstat(fh) if fh is not None else os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        times = {f"st_{one}time": getattr(found, f"st_{one}time_ns") for one in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._content)
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    def chmod(self, path: str, mode: int) -> int:
        self._at(path).chmod(mode)
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        os.utime(self._at(path), ns=times)
        return 0

    def _at(self, path: str) -> Path:
        return self._content / path.lstrip("/")


class VolatileDirectory:
    """One that is mounted at `path` while the `with` block runs, with its process below `root`."""

    _module = "tests.framework.volatile"

    def __init__(self, root: Path, *, direct_io: bool = False) -> None:
        """`direct_io`: have the kernel keep nothing of the files (FOPEN_DIRECT_IO)."""
        self._options = ["direct_io"] if direct_io else []
        self.path = root / "volatile"
        self._content = root / "content"
        self.path.mkdir()
        self._content.mkdir()

    def __enter__(self) -> Self:
        serve = [sys.executable, "-m", self._module, str(self.path), str(self._content)]
        self._process = subprocess.Popen(
            [*serve, *self._options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self.path.is_mount():
            assert self._process.poll() is None, "the filesystem has ended"
            assert time.monotonic() < deadline, "the filesystem was not mounted"
            time.sleep(0.01)
        return self

    def lose_power(self) -> int:
        """Forget what was not synced; how many changes that were. Nobody may be using it."""
        return int(self.ask("lose"))

    def syncs(self) -> int:
        return int(self.ask("syncs"))

    def ignore_syncs(self) -> None:
        """Answer them without doing anything, as a broken drive does."""
        self.ask("ignore")

    def ask(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", str(self.path)], check=True)
        self._process.communicate(timeout=_START_SECONDS)


def main(
    mount: str, content: str, *options: str, kind: type[VolatileFilesystem] = VolatileFilesystem, **more: Any
) -> None:
    """`kind`: what is served; `more`: further options of libfuse's."""
    filesystem = kind(Path(content))

    def listen() -> None:
        for line in sys.stdin:
            print(filesystem.command(line.strip()), flush=True)

    threading.Thread(target=listen, daemon=True).start()
    # Nothing is to be remembered by the kernel that a loss of power may change.
    flags: dict[str, Any] = {"attr_timeout": 0, "entry_timeout": 0} | dict.fromkeys(options, True)
    mfusepy.FUSE(
        filesystem, mount, **({"foreground": True, "nothreads": True, "fsname": "volatile"} | flags | more)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
