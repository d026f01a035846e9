"""What dm-log-writes has written down of a drive's life, and the drive as a loss of power would have left it.

The format is the kernel's (Documentation/admin-guide/device-mapper/log-writes.rst, drivers/md/dm-log-writes.c): a super
block in the first sector, `magic, version, nr_entries` as u64 and `sectorsize` as u32, then each entry in a sector of
its own, `sector, nr_sectors, flags, data_len` as u64, little-endian and counted in `sectorsize`. Behind an entry's
fields, in the same sector, is the text of a mark (`data_len` bytes); behind its sector are the `nr_sectors` that it
wrote, but for a discard, which has none.

The kernel writes a request down when it is known to be durable: one with FUA when it has ended, and others together
with the flush that began behind their end, in the order in which they ended. So each prefix of the log is a state that
a drive may be in, and so is one with any of the writes before a flush.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

MAGIC = 0x6A736677736872
VERSION = 1
# A drive tears a write between sectors.
SECTOR = 512

_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


class Flag(IntFlag):
    """Of an entry."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True)
class Entry:
    """A request that the drive has done: `length` bytes from byte `offset` of the drive, which are at byte `data_at` of
    the log. `mark`: of a mark, its text."""

    offset: int
    length: int
    flags: Flag
    data_at: int
    mark: str | None = None

    @property
    def waits(self) -> bool:
        """Whether a flush made it durable that came later."""
        return self.length > 0 and not self.flags & (Flag.FLUSH | Flag.FUA | Flag.MARK)


class WriteLog:
    """The log in a file."""

    def __init__(self, path: Path) -> None:
        """ValueError where that is none, or one of a version that nobody knows."""
        self._path = path
        with path.open("rb") as file:
            magic, version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
            if (magic, version) != (MAGIC, VERSION):
                raise ValueError(
                    f"{path} begins with {magic:#x}, version {version}, and is no log of writes."
                )
            at = sector
            self.entries: list[Entry] = []
            for _ in range(count):
                file.seek(at)
                where, length, bits, text = _ENTRY.unpack(file.read(_ENTRY.size))
                flags = Flag(bits)
                mark = file.read(text).decode() if flags & Flag.MARK else None
                data_at = at + sector
                self.entries.append(Entry(where * sector, length * sector, flags, data_at, mark))
                at = data_at if flags & Flag.DISCARD else data_at + length * sector

    def groups(self) -> Iterator[range]:
        """The writes that one flush made durable, each time: by their places among the entries."""
        begin = 0
        for place, entry in enumerate(self.entries):
            if not entry.waits:
                if begin < place:
                    yield range(begin, place)
                begin = place + 1

    def replay(self, drive: Path, places: Sequence[int], *, sectors: int | None = None) -> None:
        """Have these entries done once more, to the file `drive`; of each only the first `sectors` where that is
        given, as a drive without power does."""
        with self._path.open("rb") as log, drive.open("r+b") as file:
            for place in places:
                entry = self.entries[place]
                length = entry.length if sectors is None else min(entry.length, sectors * SECTOR)
                if entry.flags & Flag.MARK or length == 0:
                    continue
                file.seek(entry.offset)
                if entry.flags & Flag.DISCARD:
                    # What a drive has behind a discard is its own affair; this one has zeroes.
                    file.write(bytes(length))
                    continue
                log.seek(entry.data_at)
                file.write(log.read(length))
