"""Folders of a run: in memory where there is room, named after the process that they belong to.

A run that was killed (SIGKILL) removes nothing; the next one that begins does it in its place.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")
# What a run's tests may write; Ceph keeps three copies of it.
_NEEDED = 6 << 30
_OWNED = re.compile(r"ringstone-(?:lab|ceph)-(\d+)-")


def make_folder(kind: str) -> Path:
    """A new folder of this process; `kind` ("lab", "ceph") is part of its name, which is short: Unix sockets go
    below."""
    remove_remains()
    memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _NEEDED
    parent = _MEMORY if memory else _disk()
    return Path(tempfile.mkdtemp(prefix=f"ringstone-{kind}-{os.getpid()}-", dir=parent))


def remove_remains() -> None:
    """Remove the folders of processes that are gone."""
    for parent in (_MEMORY, _disk()):
        for path in parent.glob("ringstone-*"):
            found = _OWNED.match(path.name)
            if found and not alive(int(found[1])):
                shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether there is a process of that id."""
    return Path(f"/proc/{pid}").exists()


def _disk() -> Path:
    # Not /tmp, which is in memory on many machines too.
    return Path(os.environ.get("TMPDIR", "/var/tmp"))
