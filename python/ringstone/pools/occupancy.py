"""What is on a block device or in a file that is to become one pool's own, and who has it open."""

import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringstone.errors import BusyError, error_of_os

# Bytes looked at where no signature is known: a disk image begins with something, and a backup GPT ends one.
_EDGE = 1 << 20
_PROBE_SECONDS = 20
# udev looks at a device for a moment when it appears or was written.
_PASSING_SECONDS = 2.0


def medium(path: str) -> str | None:
    """Names what is at `path`, whatever it is called: two names of one device are the same. None where nothing is."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(found.st_mode):
        return f"device {found.st_rdev}"
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory"}
    return f"{kinds.get(stat.S_IFMT(found.st_mode), 'other')} {found.st_dev}:{found.st_ino}"


@contextmanager
def claimed(path: str) -> Iterator[int]:
    """A descriptor of a block device that is held against mounts and other claims meanwhile; BusyError where it is in
    use."""
    try:
        # O_EXCL without O_CREAT: the kernel refuses a block device that is mounted or claimed, open(2).
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise error_of_os(
            error, f"opening {path} for itself", "Unmount it or stop what uses it, then try again."
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def refuse_users(path: str) -> None:
    """BusyError that names who has it open: whoever merely has it open is not seen by the claim."""
    end = time.monotonic() + _PASSING_SECONDS
    while found := users(path):
        if time.monotonic() > end:
            raise BusyError(f"{path} is open in {', '.join(found)}; stop what uses it, then try again.")
        time.sleep(0.05)


def content(path: str) -> str | None:
    """What a device or file holds, in words for "it holds ...": what wipefs(8) knows by its signature, or data that it
    does not know at its begin or end. None where it is blank there. OSError."""
    known = _signatures(path)
    if known:
        return ", ".join(known)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        for start in (0, max(size - _EDGE, 0)):
            # A full megabyte, or all there is.
            if any(os.pread(fd, _EDGE, start)):
                return "data of an unknown kind"
    finally:
        os.close(fd)
    return None


def clear(fd: int) -> None:
    """Zero what content() looks at, so that nobody takes it for what was there. OSError."""
    size = os.lseek(fd, 0, os.SEEK_END)
    for start in (0, max(size - _EDGE, 0)):
        end = min(start + _EDGE, size)
        while start < end:
            start += os.pwrite(fd, bytes(end - start), start)
    os.fsync(fd)


def _signatures(path: str) -> list[str]:
    """Types of filesystems, partition tables, RAID and LVM members, in wipefs' words; none where it cannot be asked."""
    try:
        asked = subprocess.run(
            ["wipefs", "--no-act", "--json", path],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
        found = json.loads(asked.stdout or '{"signatures": []}')["signatures"]
        return list(dict.fromkeys(str(one["type"]) for one in found))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        # content() looks at the bytes, so such a device is at most called by a vaguer name.
        return []


def users(path: str) -> list[str]:
    """Other processes that have it open, as `NAME (process PID)`; of those that this one may look into."""
    wanted = _identity(os.stat(path))
    found: list[str] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            opened = (fd.stat() for fd in (process / "fd").iterdir())
            if any(_identity(one) == wanted for one in opened):
                found.append(f"{(process / 'comm').read_text().strip()} (process {process.name})")
        except OSError:
            # It has ended, or is another user's.
            continue
    return found


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """A device is the same by whichever of its nodes it was opened."""
    return (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)
