"""Write the seeds of the fuzz targets: well-formed inputs from which the fuzzer starts to go astray.

Run it after a target's input format changes: `python fuzz/make_seeds.py`. Layouts: virtio 1.2, 2.7 and 5.2.6.
"""

import struct
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"

NEXT, WRITE, INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
EVENT_IDX, INDIRECT_DESC, BLOCK_4K, READ_ONLY, CAN_DISCARD, CAN_ZERO, PACKED_TIGHT = 1, 2, 4, 8, 16, 32, 128

Descriptor = tuple[int, int, int, int]  # address, length, flags, next
RING = 8
HEADER, RANGE, DATA, TABLE = 0x400, 0x440, 0x1000, 0x600


def ring_input(
    kind: int, sector: int, descriptors: list[Descriptor], flags: int, table: tuple[Descriptor, ...] = ()
) -> bytes:
    """One available chain at head 0 of a ring of 8; `table` is an indirect table at TABLE."""
    setup = struct.pack("<BBHHHH", 3, flags | PACKED_TIGHT, 0, 0, 0, 0)
    memory = bytearray(0x700)
    for index, descriptor in enumerate(descriptors):
        struct.pack_into("<QIHH", memory, 16 * index, *descriptor)
    for index, descriptor in enumerate(table):
        struct.pack_into("<QIHH", memory, TABLE + 16 * index, *descriptor)
    struct.pack_into("<HHH", memory, 16 * RING, 0, 1, 0)
    struct.pack_into("<IIQ", memory, HEADER, kind, 0, sector)
    struct.pack_into("<QII", memory, RANGE, sector, 8, 0)
    return setup + bytes(memory).rstrip(b"\0")


def data_chain(writable: int, length: int, at: int = DATA) -> list[Descriptor]:
    """Header, one buffer, status."""
    return [(HEADER, 16, NEXT, 1), (at, length, NEXT | writable, 2), (0x500, 1, WRITE, 0)]


def ring_seeds() -> dict[str, bytes]:
    """Name to input of the target `rings`."""
    ranged: list[Descriptor] = [(HEADER, 16, NEXT, 1), (RANGE, 16, NEXT, 2), (0x500, 1, WRITE, 0)]
    pointer: list[Descriptor] = [(TABLE, 48, INDIRECT, 0)]
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
