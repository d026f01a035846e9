"""The golden stats page, written by hand from docs/formats/stats-page.md, for decoders in any language.

`python -m tests.framework.stats_vector` writes docs/formats/vectors/stats-page.bin anew. Offsets are spelled
out here on purpose, so that this file and the decoders can only agree by both following the document.
"""

import struct
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "docs/formats/vectors/stats-page.bin"

REACTORS_AT = 4096
QUEUES_AT = 8192
QUEUE_SIZE = 8192
QUEUES = 4


def _u32(page: bytearray, at: int, value: int) -> None:
    struct.pack_into("<I", page, at, value)


def _u64(page: bytearray, at: int, value: int) -> None:
    struct.pack_into("<Q", page, at, value)


def golden_page() -> bytes:
    page = bytearray(QUEUES_AT + QUEUES * QUEUE_SIZE)
    page[0:8] = b"RSSTATS1"
    _u32(page, 8, 1)
    _u32(page, 12, 4096)
    _u64(page, 16, 4242)
    _u64(page, 24, 1_700_000_000_123_456_789)
    _u32(page, 32, 2)
    _u32(page, 36, 256)
    _u64(page, 40, REACTORS_AT)
    _u32(page, 48, QUEUES)
    _u32(page, 52, QUEUE_SIZE)
    _u64(page, 56, QUEUES_AT)

    # Reactor 0: bound to CPU 3, polling. Its counters are 1000 plus their offset in the slot.
    _u32(page, REACTORS_AT + 0, 3)
    _u32(page, REACTORS_AT + 4, 1)
    for offset in range(8, 96, 8):
        _u64(page, REACTORS_AT + offset, 1000 + offset)
    # Reactor 1: bound to CPU 5, asleep; one counter at the top of its range.
    second = REACTORS_AT + 256
    _u32(page, second + 0, 5)
    _u32(page, second + 4, 2)
    _u64(page, second + 24, (1 << 64) - 1)

    # Slot 0: queue 0 of "alpha" on reactor 1. Its counters are 2000 plus their offset in the slot.
    slot = QUEUES_AT
    _u32(page, slot + 0, 6)
    _u32(page, slot + 4, 1)
    page[slot + 8 : slot + 13] = b"alpha"
    _u32(page, slot + 72, 0)
    _u32(page, slot + 76, 1)
    _u32(page, slot + 80, 256)
    for offset in range(88, 224, 8):
        _u64(page, slot + offset, 2000 + offset)
    # Reads: once 0 ns (bucket 0), 7 ns (7), 8 ns (8), 1 us (63), and ten times 1 ms (143); writes: more than
    # the last bucket's edge (319) twice; others: none.
    for bucket, count in ((0, 1), (7, 1), (8, 1), (63, 1), (143, 10)):
        _u64(page, slot + 512 + bucket * 8, count)
    _u64(page, slot + 3072 + 319 * 8, 2)

    # Slot 1: queue 63 of a volume whose name fills its 63 bytes, stopped, without counts.
    slot = QUEUES_AT + QUEUE_SIZE
    _u32(page, slot + 0, 2)
    _u32(page, slot + 4, 1)
    page[slot + 8 : slot + 71] = b"z" * 63
    _u32(page, slot + 72, 63)
    _u32(page, slot + 76, 0xFFFFFFFF)

    # Slot 2: being set up (odd generation), so that a reader must leave it out.
    slot = QUEUES_AT + 2 * QUEUE_SIZE
    _u32(page, slot + 0, 3)
    _u32(page, slot + 4, 1)
    page[slot + 8 : slot + 13] = b"ghost"

    # Slot 3: free, but once used: its generation is even and its name is still there.
    slot = QUEUES_AT + 3 * QUEUE_SIZE
    _u32(page, slot + 0, 4)
    _u32(page, slot + 4, 0)
    page[slot + 8 : slot + 12] = b"gone"
    return bytes(page)


if __name__ == "__main__":
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_bytes(golden_page())
