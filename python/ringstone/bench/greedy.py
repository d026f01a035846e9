"""A guest that asks for as much as it can: long requests in many queues, all of one piece of its memory.

with LongReads(socket, queues=4) as storm:
    ...  # measure what the neighbours on its reactor notice
storm.count
"""

import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack

from ringstone.bench.storms import MIB, Frontend, Storm

# Of each request: as many segments as we announce, each the same mebibyte.
SEGMENTS = 60
REQUEST_BYTES = SEGMENTS * MIB
_DEPTH = 8
_RING_ENTRIES = 16
# In guest memory: an area for each queue's ring, tables and headers, and behind them the data.
_AREA = 64 << 10
_AVAILABLE_AT, _USED_AT, _HEADERS_AT, _TABLES_AT = 2048, 4096, 8192, 16384
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_DESCRIPTOR = struct.Struct("<QIHH")
_POLL_SECONDS = 0.001


class LongReads(Storm):
    """Keeps `queues` queues full of reads of REQUEST_BYTES from the begin of the volume. Counts those done."""

    def __init__(self, path: str, *, queues: int = 4, cores: Sequence[int] = ()) -> None:
        super().__init__(path, cores=cores)
        self._queues = queues

    def _blow(self) -> None:
        size = self._queues * _AREA + 2 * MIB
        with ExitStack() as stack:
            fd = os.memfd_create("greedy")
            stack.callback(os.close, fd)
            os.ftruncate(fd, size)
            memory = stack.enter_context(mmap.mmap(fd, size))
            frontend = stack.enter_context(Frontend(self._path))
            frontend.negotiate(indirect=True)
            frontend.set_memory(fd, size)
            words = stack.enter_context(memoryview(memory).cast("H"))
            data = self._queues * _AREA
            rings = [_Ring(memory, words, index * _AREA, data=data) for index in range(self._queues)]
            for index, ring in enumerate(rings):
                kick = os.eventfd(0, os.EFD_NONBLOCK)
                stack.callback(os.close, kick)
                frontend.run_ring(index, _RING_ENTRIES, *ring.addresses, kick)
                ring.kick = kick
                for head in range(_DEPTH):
                    ring.offer(head)
            while not self._enough.wait(_POLL_SECONDS):
                for ring in rings:
                    self.count += ring.turn()


class _Ring:
    """A split ring whose every head names an indirect table with one long read. `words` is the memory in 16-bit words,
    through which indices are read and written: the device reads them at any moment, and must never see half of one."""

    def __init__(self, memory: mmap.mmap, words: "memoryview[int]", at: int, *, data: int) -> None:
        self.addresses = at, at + _AVAILABLE_AT, at + _USED_AT
        self.kick = -1
        self._memory = memory
        self._words = words
        # Of the words that follow the flags: the index, and the ring of entries.
        self._available_at, self._used_at = ((at + one) // 2 + 1 for one in (_AVAILABLE_AT, _USED_AT))
        self._available = self._used = 0
        for head in range(_DEPTH):
            header, table = at + _HEADERS_AT + 64 * head, at + _TABLES_AT + 2048 * head
            struct.pack_into("<IIQ", memory, header, 0, 0, 0)
            _DESCRIPTOR.pack_into(memory, table, header, 16, _NEXT, 1)
            for number in range(1, SEGMENTS + 1):
                _DESCRIPTOR.pack_into(memory, table + 16 * number, data, MIB, _NEXT | _WRITE, number + 1)
            _DESCRIPTOR.pack_into(memory, table + 16 * (SEGMENTS + 1), header + 32, 1, _WRITE, 0)
            _DESCRIPTOR.pack_into(memory, at + 16 * head, table, 16 * (SEGMENTS + 2), _INDIRECT, 0)

    def offer(self, head: int) -> None:
        self._words[self._available_at + 1 + self._available % _RING_ENTRIES] = head
        self._available = (self._available + 1) % (1 << 16)
        self._words[self._available_at] = self._available
        os.eventfd_write(self.kick, 1)

    def turn(self) -> int:
        """Offer again what was done; how many that were."""
        done = 0
        while self._words[self._used_at] != self._used:
            # The low word of an entry's id: heads are few.
            self.offer(self._words[self._used_at + 1 + 4 * (self._used % _RING_ENTRIES)])
            self._used = (self._used + 1) % (1 << 16)
            done += 1
        return done
