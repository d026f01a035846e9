"""Write the seeds of the fuzz targets: well-formed inputs from which the fuzzer starts to go astray.

Run it after a target's input format changes: `python fuzz/make_seeds.py`. Layouts: virtio 1.2, 2.7 and 5.2.6.
"""

import struct
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"

NEXT, WRITE, INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
# Bits of the second byte of a set-up, and of the first, which has the ring's size in its lower five.
EVENT_IDX, INDIRECT_DESC, BLOCK_4K, READ_ONLY = 1, 2, 4, 8
CAN_DISCARD, CAN_ZERO, PACKED, TIGHT = 16, 32, 64, 128
IN_FLIGHT, LOG = 32, 64
# What a packed ring's descriptors have beside: available in the first lap.
AVAIL = 1 << 7
PACKED_BEGIN = 0x8000

Descriptor = tuple[int, int, int, int]  # address, length, flags, next
RING = 8
HEADER, RANGE, DATA, TABLE = 0x400, 0x440, 0x1000, 0x600


def ring_input(
    kind: int, sector: int, descriptors: list[Descriptor], flags: int, table: tuple[Descriptor, ...] = ()
) -> bytes:
    """One available chain at head 0 of a ring of 8; `table` is an indirect table at TABLE."""
    return struct.pack("<BBHHHH", 3, flags | TIGHT, 0, 0, 0, 0) + guest_memory(
        kind, sector, descriptors, table
    )


def guest_memory(
    kind: int, sector: int, descriptors: list[Descriptor], table: tuple[Descriptor, ...] = ()
) -> bytes:
    """The same as it lies in the guest's memory, from address 0 on."""
    memory = bytearray(0x700)
    for index, descriptor in enumerate(descriptors):
        struct.pack_into("<QIHH", memory, 16 * index, *descriptor)
    for index, descriptor in enumerate(table):
        struct.pack_into("<QIHH", memory, TABLE + 16 * index, *descriptor)
    struct.pack_into("<HHH", memory, 16 * RING, 0, 1, 0)
    struct.pack_into("<IIQ", memory, HEADER, kind, 0, sector)
    struct.pack_into("<QII", memory, RANGE, sector, 8, 0)
    return bytes(memory).rstrip(b"\0")


def packed_input(
    kind: int,
    descriptors: list[Descriptor],
    flags: int,
    table: tuple[Descriptor, ...] = (),
    keeps: int = 0,
    region: bytes = b"",
) -> bytes:
    """The same chain in a packed ring; `region` is the in-flight region, if `keeps` says that there is one."""
    memory = bytearray(guest_memory(kind, 8, []).ljust(0x700, b"\0"))
    memory[: 16 * RING + 8] = bytes(16 * RING + 8)
    for index, (address, length, bits, _) in enumerate(descriptors):
        struct.pack_into("<QIHH", memory, 16 * index, address, length, 0, bits | AVAIL)
    for index, (address, length, bits, _) in enumerate(table):
        struct.pack_into("<QIHH", memory, TABLE + 16 * index, address, length, 0, bits)
    setup = struct.pack("<BBHHHH", 3 | keeps, flags | TIGHT | PACKED, PACKED_BEGIN, PACKED_BEGIN, 0, 0)
    return setup + region + bytes(memory).rstrip(b"\0")


def split_region(in_flight: bool) -> bytes:
    """The in-flight region of a split ring of 8, in which head 0 may be in flight."""
    region = bytearray(192)
    if in_flight:
        struct.pack_into("<QHHHH", region, 0, 0, 1, RING, 0, 0)
        region[16] = 1
    return bytes(region)


def packed_region(descriptors: list[Descriptor]) -> bytes:
    """The in-flight region of a packed ring of 8, in which `descriptors` are one request in flight."""
    region = bytearray(320)
    count = len(descriptors)
    if count:
        struct.pack_into("<QHHHHHHBB", region, 0, 0, 1, RING, count, count, 0, 0, 1, 1)
        for index in range(RING):
            struct.pack_into("<H", region, 32 + 32 * index + 2, index + 1)
        struct.pack_into("<BBHHHQ", region, 32, 1, 0, 1, count - 1, count, 0)
    for index, (address, length, bits, _) in enumerate(descriptors):
        struct.pack_into("<HHIQ", region, 32 + 32 * index + 16, 0, bits | AVAIL, length, address)
    return bytes(region)


def data_chain(writable: int, length: int, at: int = DATA) -> list[Descriptor]:
    """Header, one buffer, status."""
    return [(HEADER, 16, NEXT, 1), (at, length, NEXT | writable, 2), (0x500, 1, WRITE, 0)]


def ring_seeds() -> dict[str, bytes]:
    """Name to input of the target `rings`."""
    ranged: list[Descriptor] = [(HEADER, 16, NEXT, 1), (RANGE, 16, NEXT, 2), (0x500, 1, WRITE, 0)]
    pointer: list[Descriptor] = [(TABLE, 48, INDIRECT, 0)]
    read = data_chain(WRITE, 4096)
    split_kept = bytearray(ring_input(IN, 8, read, EVENT_IDX))
    split_kept[0] |= IN_FLIGHT | LOG
    fresh, resumed = packed_region([]), packed_region(read)
    return {
        "read": ring_input(IN, 8, data_chain(WRITE, 4096), 0),
        "read-across-regions": ring_input(IN, 8, data_chain(WRITE, 4096, at=0x1800), EVENT_IDX),
        "write": ring_input(OUT, 8, data_chain(0, 4096), EVENT_IDX),
        "write-read-only": ring_input(OUT, 8, data_chain(0, 512), READ_ONLY),
        "write-4k": ring_input(OUT, 16, data_chain(0, 4096), BLOCK_4K),
        "read-indirect": ring_input(IN, 0, pointer, INDIRECT_DESC, tuple(data_chain(WRITE, 512))),
        "flush": ring_input(FLUSH, 0, [(HEADER, 16, NEXT, 1), (0x500, 1, WRITE, 0)], 0),
        "get-id": ring_input(GET_ID, 0, data_chain(WRITE, 20), 0),
        "discard": ring_input(DISCARD, 8, ranged, CAN_DISCARD),
        "write-zeroes": ring_input(WRITE_ZEROES, 8, ranged, CAN_ZERO),
        "in-flight": bytes(split_kept[:10] + split_region(in_flight=False) + split_kept[10:]),
        "resumed": bytes(split_kept[:10] + split_region(in_flight=True) + split_kept[10:]),
        "packed-read": packed_input(IN, read, EVENT_IDX),
        "packed-write": packed_input(OUT, data_chain(0, 4096), 0, keeps=LOG),
        "packed-indirect": packed_input(IN, pointer, INDIRECT_DESC, tuple(data_chain(WRITE, 512))),
        "packed-in-flight": packed_input(IN, read, EVENT_IDX, keeps=IN_FLIGHT | LOG, region=fresh),
        "packed-resumed": packed_input(IN, read, EVENT_IDX, keeps=IN_FLIGHT, region=resumed),
    }


MEMORY_RECORD, TRUNCATE_RECORD = 0xFF, 0xFE
GUEST_MEMORY, EVENTFD = 0x00, 0x10  # what the descriptors of a record are
USER = 0x7F00_0000_0000
NEED_REPLY = 8
F_VERSION_1, F_PROTOCOL, F_EVENT_IDX, F_INDIRECT = 1 << 32, 1 << 30, 1 << 29, 1 << 28
F_PACKED, F_LOG_ALL = 1 << 34, 1 << 26
PROTOCOL_FEATURES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16


def message(code: int, payload: bytes = b"", *, fds: int = 0, flags: int = 0, pause: int = 255) -> bytes:
    """One record of the target `control_messages`; `fds` is their number and kind."""
    return bytes([code, 1 | flags, fds, pause, len(payload)]) + payload


def u64(value: int) -> bytes:
    """A payload of one number."""
    return struct.pack("<Q", value)


def memory_records(content: bytes) -> bytes:
    """Records that lay `content` into guest memory; one carries 255 bytes at a multiple of 256."""
    pieces = [(at // 256, content[at : at + 255]) for at in range(0, len(content), 256)]
    assert not any(content[255::256]), "a byte that no record carries"
    return b"".join(bytes([MEMORY_RECORD, 0, at, 0, len(piece)]) + piece for at, piece in pieces)


FEATURES = F_VERSION_1 | F_PROTOCOL | F_EVENT_IDX | F_INDIRECT


def negotiation(*, protocol: bool = True, more: int = 0) -> bytes:
    """What QEMU says first, up to the memory table; `more` are features beyond its usual ones."""
    features = (FEATURES if protocol else FEATURES & ~F_PROTOCOL) | more
    region = struct.pack("<QQQQ", 0, 0x10000, USER, 0)
    negotiated = message(15) + message(16, u64(PROTOCOL_FEATURES)) + message(17) if protocol else b""
    return (
        message(1)
        + negotiated
        + message(3)
        + message(24, struct.pack("<III", 0, 60, 0) + bytes(60))
        + message(2, u64(features), flags=NEED_REPLY)
        + message(5, struct.pack("<II", 1, 0) + region, fds=GUEST_MEMORY | 1, flags=NEED_REPLY)
    )


def vring(index: int, *, enable: bool = True) -> bytes:
    """The messages that set up and start one vring of 8 entries at the begin of guest memory."""
    available, used = USER + 16 * RING, USER + (16 * RING + 6 + 2 * RING + 3) // 4 * 4
    return (
        message(8, struct.pack("<II", index, RING))
        + message(10, struct.pack("<II", index, 0))
        + message(9, struct.pack("<IIQQQQ", index, 0, USER, used, available, 0))
        + message(13, u64(index), fds=EVENTFD | 1)
        + message(12, u64(index), fds=EVENTFD | 1)
        + (message(18, struct.pack("<II", index, 1)) if enable else b"")
    )


def control_seeds() -> dict[str, bytes]:
    """Name to input of the target `control_messages`."""
    read = memory_records(guest_memory(IN, 8, data_chain(WRITE, 4096)))
    running = negotiation() + read + vring(0)
    inflight = struct.pack("<QQHHI", 0, 0, 2, 128, 0)
    log = message(6, struct.pack("<QQ", 4096, 0), fds=GUEST_MEMORY | 1, flags=NEED_REPLY)
    slot = struct.pack("<QQQQQ", 0, 0x2_0000, 0x1000, USER + 0x2_0000, 0x1000)
    return {
        "read": running + message(11, struct.pack("<II", 0, 0)),
        "read-without-protocol-features": negotiation(protocol=False) + read + vring(0, enable=False),
        "two-vrings": running + vring(1) + message(18, struct.pack("<II", 0, 0)),
        "header-in-two-pieces": message(2, u64(F_VERSION_1), pause=5) + message(1),
        "memory-slots": running + message(36) + message(37, slot, fds=GUEST_MEMORY | 1) + message(38, slot),
        "in-flight": negotiation() + message(31, inflight) + message(32, inflight, fds=GUEST_MEMORY | 1),
        "status-and-reset": running + message(39, u64(15)) + message(40) + message(39, u64(0)) + message(34),
        "config-write": running + message(25, struct.pack("<III", 32, 1, 0) + b"\1", flags=NEED_REPLY),
        "backend-channel": running + message(21, fds=EVENTFD | 1) + message(14, u64(0), fds=EVENTFD | 1),
        "truncated-memory": running
        + bytes([TRUNCATE_RECORD, 0, 0, 0, 0])
        + message(11, struct.pack("<II", 0, 0)),
        "dirty-log": running
        + log
        + message(2, u64(FEATURES | F_LOG_ALL), flags=NEED_REPLY)
        + message(11, struct.pack("<II", 0, 0))
        + message(2, u64(FEATURES)),
        "packed-and-log": negotiation(more=F_PACKED | F_LOG_ALL) + log + vring(0),
        "unmapped-while-running": running + message(5, struct.pack("<II", 0, 0)) + message(4),
    }


SUPERBLOCK, JOURNAL, PAGE, CATALOG = 0, 1, 2, 3
KILLED, POWER_LOST = b"\1", b"\0"


def spoiled(part: int, block: int, at: int, content: bytes) -> bytes:
    """A part of the store that says something else: `spoil` in src/store.rs; docs/formats/store.md has the places."""
    return struct.pack("<BHHB", part, block, at, len(content)) + content


def store_seeds() -> dict[str, bytes]:
    """Stores with one thing that cannot be, or that is rare."""
    entry = struct.pack("<IIIHH", 1, 0, 1, 0xF, 1)
    run = struct.pack("<IIIHH", 4, 0, 1 << 20, 0xF, 2)
    looped = struct.pack("<BII", 5, 1, 1)
    return {
        "sound": KILLED,
        "power-lost": POWER_LOST,
        "generation": KILLED + spoiled(SUPERBLOCK, 1, 48, b"\xff" * 8),
        "replay": POWER_LOST + spoiled(SUPERBLOCK, 0, 80, bytes(8)) + spoiled(SUPERBLOCK, 1, 80, bytes(8)),
        "zone": KILLED + spoiled(SUPERBLOCK, 0, 168, b"\xff\xff") + spoiled(SUPERBLOCK, 1, 168, b"\xff\xff"),
        "journal-gap": POWER_LOST + spoiled(JOURNAL, 20, 16, bytes(8)),
        "journal-record": KILLED
        + spoiled(JOURNAL, 20, 48, b"\x16\0\1\0" + bytes(12) + b"\1\7\0\0\0" + entry),
        "page-entry": KILLED + spoiled(PAGE, 0, 64, entry * 3) + spoiled(PAGE, 4, 64, entry * 3),
        "page-run": KILLED + spoiled(PAGE, 0, 64, run * 2) + spoiled(PAGE, 4, 64, run * 2),
        "catalog-loop": KILLED + spoiled(CATALOG, 0, 5, looped) + spoiled(CATALOG, 1, 5, looped),
    }


def write(target: str, seeds: dict[str, bytes]) -> None:
    """Replace the seeds of one target."""
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in seeds.items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    write("rings", ring_seeds())
    write("control_messages", control_seeds())
    write("store", store_seeds())
