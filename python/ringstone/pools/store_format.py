"""Reading what is on a drive with a store (docs/formats/store.md): superblock, pages of the table and of checksums,
journal and catalog.

For tests and for looking at a drive by hand; the engine reads and writes stores by itself. Sizes and places are bytes.
"""

import struct
from dataclasses import dataclass

from ringstone.errors import InvalidError

BLOCK = 4096
VERSION = 2
ENTRIES_PER_PAGE = 252

_SUPERBLOCK = struct.Struct("<8sII16s16s11QIIIHH")
_ZONE = struct.Struct("<QQQIII4x")
_PAGE = struct.Struct("<4sI16sQIIQQ8x")
_SUMS = struct.Struct("<4sI16sI36x1008I")
_ENTRY = struct.Struct("<IIIHH")
_JOURNAL = struct.Struct("<4sI8sQQQQHHQ4x")
_VOLUME = struct.Struct("<IQIIQ")
_SNAPSHOT = struct.Struct("<IIIQQ")
_ID = struct.Struct("<I")
_LAYER = struct.Struct("<II")
_SLOT_RECORD = 1
_CHANGE_RECORD = 2
_SUMS_RECORD = 3
_SUMS_OF_SLOT = struct.Struct("<BIHH")
_KINDS = ("free", "data", "zero")


@dataclass(frozen=True)
class Zone:
    table: int
    sums: int
    data: int
    first: int
    extents: int
    tombs: int


@dataclass(frozen=True)
class Superblock:
    zones: tuple[Zone, ...]
    extent: int
    uuid: bytes
    boot: bytes
    generation: int
    incarnation: int
    began: int
    table_generation: int
    replay_from: int
    replay_incarnation: int
    covered: int
    size: int
    journal_at: int
    catalog_at: int
    catalog_len: int
    journal_blocks: int
    catalog_bytes: int
    catalog_crc: int
    catalog_copy: int


@dataclass(frozen=True)
class Entry:
    """What a slot holds. `kind`: free, data or zero."""

    layer: int
    vextent: int
    count: int
    mask: int
    kind: str


@dataclass(frozen=True)
class Page:
    """`sums`: which pages of checksums were written, and of which the second copy counts; a bit for each."""

    number: int
    generation: int
    sums: tuple[int, int]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class SumsPage:
    number: int
    sums: tuple[int, ...]


@dataclass(frozen=True)
class Volume:
    name: str
    id: int
    size: int
    live: int
    origin: int
    created_s: int
    integrity: bool
    key: bytes


@dataclass(frozen=True)
class Snapshot:
    name: str
    id: int
    volume: int
    layer: int
    size: int
    created_s: int


@dataclass(frozen=True)
class Layer:
    id: int
    parent: int


@dataclass(frozen=True)
class Gone:
    """`what`: volume, snapshot or layer."""

    what: str
    id: int


@dataclass(frozen=True)
class Next:
    id: int


Change = Volume | Snapshot | Layer | Gone | Next


@dataclass(frozen=True)
class SlotRecord:
    slot: int
    entry: Entry


@dataclass(frozen=True)
class SumsRecord:
    """Checksums of a slot's blocks from `first` on. `in_place`: the blocks were about to be written."""

    slot: int
    first: int
    in_place: bool
    sums: tuple[int, ...]


Record = SlotRecord | SumsRecord | Change


@dataclass(frozen=True)
class JournalBlock:
    number: int
    incarnation: int
    began: int
    marked: int
    settled: int
    last: bool
    records: tuple[Record, ...]


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), as RFC 3720 has it in appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _check_block(block: bytes, what: str, magic: bytes) -> None:
    if len(block) != BLOCK or block[:4] != magic:
        raise InvalidError(f"this is no {what}: it does not begin with {magic!r}")
    if crc32c(block[:4] + bytes(4) + block[8:]) != struct.unpack_from("<I", block, 4)[0]:
        raise InvalidError(f"the checksum of this {what} is wrong")


def decode_superblock(block: bytes) -> Superblock:
    """A superblock of 4096 bytes. Raises InvalidError where it is none, or of another format."""
    if len(block) != BLOCK or block[:8] != b"RSTSTORE":
        raise InvalidError("this is no superblock of a store")
    if crc32c(block[:-4]) != struct.unpack_from("<I", block, BLOCK - 4)[0]:
        raise InvalidError("the checksum of this superblock is wrong")
    _, version, extent, uuid, boot, *numbers = _SUPERBLOCK.unpack_from(block)
    if version != VERSION:
        raise InvalidError(f"the store has format {version}, and this release knows format {VERSION}")
    *numbers, count = numbers
    end = _SUPERBLOCK.size + count * _ZONE.size
    if end > BLOCK - 4:
        raise InvalidError(f"a store has no {count} zones")
    zones = tuple(Zone(*zone) for zone in _ZONE.iter_unpack(block[_SUPERBLOCK.size : end]))
    return Superblock(zones, extent, uuid, boot, *numbers)


def _entry(values: tuple[int, ...]) -> Entry:
    layer, vextent, count, mask, kind = values
    if kind >= len(_KINDS):
        raise InvalidError(f"a slot has the unknown kind {kind}")
    return Entry(layer, vextent, count, mask, _KINDS[kind])


def decode_page(block: bytes) -> Page:
    """A page of the table. Raises InvalidError where it is none."""
    _check_block(block, "page of a store's table", b"RSPG")
    _, _, _, generation, number, count, *sums = _PAGE.unpack_from(block)
    if count > ENTRIES_PER_PAGE:
        raise InvalidError(f"a page has no {count} entries")
    entries = _ENTRY.iter_unpack(block[_PAGE.size : _PAGE.size + count * _ENTRY.size])
    return Page(number, generation, (sums[0], sums[1]), tuple(_entry(values) for values in entries))


def decode_sums(block: bytes) -> SumsPage:
    """A page of checksums. Raises InvalidError where it is none."""
    _check_block(block, "page of a store's checksums", b"RSSM")
    _, _, _, number, *sums = _SUMS.unpack_from(block)
    return SumsPage(number, tuple(sums))


class _Bytes:
    """Takes values off bytes."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, count: int) -> bytes:
        if len(self.rest) < count:
            raise InvalidError("a record ends in its midst")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def text(self) -> str:
        try:
            return self.take(self.take(1)[0]).decode()
        except UnicodeDecodeError as error:
            raise InvalidError("a name is not UTF-8") from error


def _change(data: _Bytes) -> Change:
    kind = data.take(1)[0]
    match kind:
        case 1:
            id_, size, live, origin, created_s = data.numbers(_VOLUME)
            name = data.text()
            flags, length = data.take(2)
            return Volume(name, id_, size, live, origin, created_s, bool(flags & 1), data.take(length))
        case 3:
            numbers = data.numbers(_SNAPSHOT)
            return Snapshot(data.text(), *numbers)
        case 5:
            return Layer(*data.numbers(_LAYER))
        case 2 | 4 | 6:
            what = {2: "volume", 4: "snapshot", 6: "layer"}[kind]
            return Gone(what, *data.numbers(_ID))
        case 7:
            return Next(*data.numbers(_ID))
    raise InvalidError(f"a change has the unknown kind {kind}")


def decode_journal(block: bytes) -> JournalBlock:
    """A block of the journal. Raises InvalidError where it is none."""
    _check_block(block, "block of a store's journal", b"RSJL")
    _, _, _, number, incarnation, began, marked, length, flags, settled = _JOURNAL.unpack_from(block)
    data = _Bytes(block[_JOURNAL.size :])
    data = _Bytes(data.take(length))
    records: list[Record] = []
    while data.rest:
        kind = data.take(1)[0]
        if kind == _SLOT_RECORD:
            (slot,) = data.numbers(_ID)
            records.append(SlotRecord(slot, _entry(data.numbers(_ENTRY))))
        elif kind == _CHANGE_RECORD:
            records.append(_change(data))
        elif kind == _SUMS_RECORD:
            flags_of_sums, slot, first, count = data.numbers(_SUMS_OF_SLOT)
            sums = data.numbers(struct.Struct(f"<{count}I"))
            records.append(SumsRecord(slot, first, bool(flags_of_sums & 1), sums))
        else:
            raise InvalidError(f"a record has the unknown kind {kind}")
    return JournalBlock(number, incarnation, began, marked, settled, bool(flags & 1), tuple(records))


def decode_catalog(data: bytes) -> list[Change]:
    """The catalog's changes, in their order. Raises InvalidError where they are none."""
    rest = _Bytes(data)
    changes = []
    while rest.rest:
        changes.append(_change(rest))
    return changes
