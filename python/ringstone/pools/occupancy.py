"""What is on a block device, and who has it open."""

import json
import os
import stat
import subprocess
from pathlib import Path

# Bytes looked at where no signature is known: a disk image begins with something, and a backup GPT ends one.
_EDGE = 1 << 20
_PROBE_SECONDS = 20


def content(path: str) -> str | None:
    """What a device holds, in words for "it holds ...": what wipefs(8) knows by its signature, or data that it does not
    know at the begin or end of the device. None for a device that is blank there. OSError."""
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
    """Other processes that have the block device open, as `NAME (process PID)`; of those that this one may look
    into."""
    device = os.stat(path).st_rdev
    found: list[str] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            opened = (fd.stat() for fd in (process / "fd").iterdir())
            if any(_is_device(one, device) for one in opened):
                found.append(f"{(process / 'comm').read_text().strip()} (process {process.name})")
        except OSError:
            # It has ended, or is another user's.
            continue
    return found


def _is_device(opened: os.stat_result, device: int) -> bool:
    return stat.S_ISBLK(opened.st_mode) and opened.st_rdev == device
