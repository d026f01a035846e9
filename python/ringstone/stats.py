"""The engine's counters: reading the stats page (docs/formats/stats-page.md), histograms, and rates between
two readings.

Times are nanoseconds and sizes bytes. Reading never stops a reactor.
"""

import mmap
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from ringstone.errors import StateError

MAGIC = b"RSSTATS1"
VERSION = 1
BUCKETS = 320
_STOPPED = 0xFFFFFFFF

_HEADER = struct.Struct("<8sIIQQIIQIIQ")
_REACTOR = struct.Struct("<II11Q")
_SLOT = struct.Struct("<II64sIII4x17Q")
_HISTOGRAM = struct.Struct(f"<{BUCKETS}Q")
_HISTOGRAMS = (512, 3072, 5632)
_REACTOR_STATES = {0: "not started", 1: "polling", 2: "asleep", 3: "removed"}
_TRIES = 8


def bucket_of(latency_ns: int) -> int:
    """The histogram bucket that counts a latency."""
    if latency_ns < 8:
        return max(latency_ns, 0)
    exponent = latency_ns.bit_length() - 1
    return min((exponent - 2) * 8 + ((latency_ns >> (exponent - 3)) & 7), BUCKETS - 1)


def bucket_edges(bucket: int) -> tuple[int, int]:
    """The lowest and the highest latency that `bucket` counts, both inclusive."""
    if bucket < 8:
        return bucket, bucket
    exponent, sub = bucket // 8 + 2, bucket % 8
    width = 1 << (exponent - 3)
    lower = (8 + sub) * width
    return lower, lower + width - 1


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts by bucket; empty buckets are left out."""

    buckets: dict[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.buckets.values())

    def percentile(self, share: float) -> int | None:
        """The latency that `share` (0.99 is p99) of the requests did not exceed, as the upper edge of its
        bucket: at most 12.5 % above the true one, never below it. None when nothing was counted."""
        total = self.count
        if total == 0:
            return None
        rank = max(1, -int(-share * total // 1))
        seen = 0
        last = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            last = bucket
            if seen >= rank:
                break
        return bucket_edges(last)[1]

    def mean(self) -> float | None:
        """From the middle of each bucket; None when nothing was counted."""
        total = self.count
        if total == 0:
            return None
        return sum(sum(bucket_edges(bucket)) / 2 * count for bucket, count in self.buckets.items()) / total

    def __add__(self, other: "Histogram") -> "Histogram":
        merged = dict(self.buckets)
        for bucket, count in other.buckets.items():
            merged[bucket] = merged.get(bucket, 0) + count
        return Histogram(merged)

    def since(self, older: "Histogram") -> "Histogram":
        """What was counted after `older`, an earlier reading of the same histogram."""
        grown = {bucket: count - older.buckets.get(bucket, 0) for bucket, count in self.buckets.items()}
        return Histogram({bucket: count for bucket, count in grown.items() if count > 0})


@dataclass(frozen=True, slots=True)
class ReactorCounters:
    """One reactor's slot. `state`: not started, polling, asleep or removed."""

    core: int
    state: str
    busy_ns: int
    idle_ns: int
    asleep_ns: int
    turns: int
    enters: int
    submitted: int
    reaped: int
    wakeups: int
    messages: int
    queues: int
    calls: int


@dataclass(frozen=True, slots=True)
class QueueCounters:
    """One queue's slot. `generation` tells two uses of one slot apart; `reactor` is None while the queue is
    stopped."""

    generation: int
    volume: str
    index: int
    reactor: int | None
    entries: int
    in_flight: int
    reads: int
    writes: int
    flushes: int
    discards: int
    zeroes: int
    others: int
    bytes_read: int
    bytes_written: int
    bytes_discarded: int
    errors: int
    bounces: int
    kicks: int
    calls: int
    busy_ns: int
    moves: int
    resubmitted: int
    read_latency: Histogram
    write_latency: Histogram
    other_latency: Histogram

    @property
    def operations(self) -> int:
        """Of every kind."""
        return self.reads + self.writes + self.flushes + self.discards + self.zeroes + self.others


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading. `at_ns` is CLOCK_MONOTONIC of the host, `start_ns` CLOCK_REALTIME of the engine's
    start."""

    at_ns: int
    pid: int
    start_ns: int
    reactors: tuple[ReactorCounters, ...]
    queues: tuple[QueueCounters, ...]

    def of_volume(self, volume: str) -> tuple[QueueCounters, ...]:
        return tuple(queue for queue in self.queues if queue.volume == volume)


def decode(page: bytes | mmap.mmap, *, at_ns: int = 0) -> Snapshot:
    """Read a stats page; StateError when it is not one that this version knows. A queue whose slot is being
    set up or torn down is left out."""
    if len(page) < _HEADER.size or page[:8] != MAGIC:
        raise StateError(
            "The stats page does not begin with RSSTATS1. Check that the path is a gateway's stats page."
        )
    (
        _,
        version,
        _header_size,
        pid,
        start_ns,
        reactors,
        reactor_size,
        reactors_at,
        queues,
        queue_size,
        queues_at,
    ) = _HEADER.unpack_from(page)
    if version != VERSION:
        raise StateError(
            f"The stats page has version {version}, and this Ringstone reads version {VERSION}. "
            "Use the same Ringstone for the gateway and the reader."
        )
    if len(page) < max(reactors_at + reactors * reactor_size, queues_at + queues * queue_size):
        raise StateError(
            "The stats page is shorter than its header says. Restart the gateway to make it anew."
        )
    decoded = (_queue(page, queues_at + index * queue_size) for index in range(queues))
    return Snapshot(
        at_ns=at_ns,
        pid=pid,
        start_ns=start_ns,
        reactors=tuple(_reactor(page, reactors_at + index * reactor_size) for index in range(reactors)),
        queues=tuple(
            sorted((queue for queue in decoded if queue), key=lambda queue: (queue.volume, queue.index))
        ),
    )


def _reactor(page: bytes | mmap.mmap, at: int) -> ReactorCounters:
    core, state, *counters = _REACTOR.unpack_from(page, at)
    return ReactorCounters(core, _REACTOR_STATES.get(state, f"unknown ({state})"), *counters)


def _queue(page: bytes | mmap.mmap, at: int) -> QueueCounters | None:
    for _ in range(_TRIES):
        generation, used = struct.unpack_from("<II", page, at)
        if not used or generation % 2:
            return None
        _, _, name, index, reactor, entries, *counters = _SLOT.unpack_from(page, at)
        histograms = [_histogram(page, at + offset) for offset in _HISTOGRAMS]
        if struct.unpack_from("<I", page, at)[0] != generation:
            continue
        return QueueCounters(
            generation,
            name.split(b"\0", 1)[0].decode(errors="replace"),
            index,
            None if reactor == _STOPPED else reactor,
            entries,
            *counters,
            *histograms,
        )
    return None


def _histogram(page: bytes | mmap.mmap, at: int) -> Histogram:
    counts = _HISTOGRAM.unpack_from(page, at)
    return Histogram({bucket: count for bucket, count in enumerate(counts) if count})


class StatsPage:
    """The page of a running engine, mapped read-only."""

    def __init__(self, path: Path) -> None:
        """OSError when `path` cannot be mapped."""
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def read(self) -> Snapshot:
        return decode(self._map, at_ns=time.monotonic_ns())

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
