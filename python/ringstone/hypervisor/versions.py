"""What differs between the versions of QEMU that people run: the one place where that is kept.

Each difference names the first version that has it and where that is said. A version newer than any known one gets the
newest form.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from ringstone.errors import InvalidError, NotFoundError

QEMU = "qemu-system-x86_64"
# Two numbers, as features come with these; what follows is Debian's or a fix.
_VERSION = re.compile(r"(\d+)\.(\d+)")
_ANSWER_SECONDS = 30


@dataclass(frozen=True, order=True)
class QemuVersion:
    """QEMU's version as far as features depend on it."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "10.0", "7.2.22" or what `--version` prints. InvalidError where there is none in it."""
        found = _VERSION.search(text)
        if found is None:
            raise InvalidError(f"{text!r} is no version of QEMU; give one such as 10.0.")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def of_program(cls, program: str | Path) -> Self:
        """What `program`, a path or a name on PATH, says of itself. NotFoundError, InvalidError."""
        found = shutil.which(program)
        if found is None:
            raise NotFoundError(
                f"The program {program} is missing; install Debian's package qemu-system-x86, or say which version "
                "it is with --qemu-version."
            )
        return cls.parse(_answer(found))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@cache
def _answer(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidError(f"{program} --version does not answer: {error}.") from error
    if done.returncode or not done.stdout.startswith("QEMU emulator version"):
        raise InvalidError(
            f"{program} --version does not say that it is QEMU; give the path of a qemu-system program."
        )
    return done.stdout


NEWEST = QemuVersion(9999, 0)


@dataclass(frozen=True)
class Difference:
    """Something that QEMU has from version `since` on, and before `until`. `source` is where QEMU says so, or what was
    tried."""

    since: QemuVersion
    what: str
    source: str
    until: QemuVersion | None = None

    def __call__(self, version: QemuVersion) -> bool:
        """Whether `version` has it."""
        return version >= self.since and (self.until is None or version < self.until)


TRACKS_TCG_PAGES = Difference(
    QemuVersion(9, 0),
    "a migration finds all that an emulated guest wrote, whatever its memory's size",
    "commit 03bfc2188f",
)
RECONNECT_MS = Difference(
    QemuVersion(9, 2),
    "a socket chardev has `reconnect-ms`; its `reconnect`, in seconds, was deprecated then, and 11.1 refuses it",
    "docs/about/deprecated.rst; tried with 7.2.22, 10.0.13 and 11.1.3",
)
RINGS_OF_1024 = Difference(
    QemuVersion(10, 0),
    "rings have 1024 entries whatever `queue-size` says; a QEMU that keeps to it, as 11.1 does, takes such a disk only "
    "where its own `queue-size` is 1024, and such a virtio-serial or virtio-console not at all",
    "tried with 10.0.13 and 11.1.3",
    until=QemuVersion(10, 1),
)
INFLIGHT_MIGRATION = Difference(
    QemuVersion(11, 0),
    "a vhost-user-blk disk has `inflight-migration`: requests in flight move along instead of being waited for",
    "hw/block/vhost-user-blk.c; tried with 11.1.3",
)
DROPS_SIZE_MAX = Difference(
    QemuVersion(11, 1),
    "a guest to which an older QEMU gave a backend's `size_max` cannot move here; Ringstone no longer offers it, and "
    "`vm migrate` leaves such a guest where it was",
    "tried from 7.2.22 and 10.0.13 to 11.1.3 (findings/qemu-11.1-drops-size-max.sh)",
)
MONITOR_OBJECT = Difference(
    QemuVersion(11, 1),
    "a monitor is an object, `-object monitor-qmp`; `-mon` is deprecated",
    "its own warning; tried with 11.1.3",
)

DIFFERENCES = (
    TRACKS_TCG_PAGES,
    RECONNECT_MS,
    RINGS_OF_1024,
    INFLIGHT_MIGRATION,
    DROPS_SIZE_MAX,
    MONITOR_OBJECT,
)
