"""Rates between two readings of the stats page, for people: IOPS, bytes per second, percentiles, busy
share."""

import itertools
from dataclasses import dataclass

from ringstone.stats import Histogram, QueueCounters, ReactorCounters, Snapshot

_SUMMED = (
    "reads",
    "writes",
    "flushes",
    "discards",
    "zeroes",
    "others",
    "bytes_read",
    "bytes_written",
    "bytes_discarded",
    "errors",
    "bounces",
    "kicks",
    "calls",
)


@dataclass(frozen=True, slots=True)
class VolumeRates:
    """Per second over `seconds`, over all of a volume's queues; latencies in nanoseconds, None when nothing
    was done. `in_flight` is the queue depth at the end."""

    volume: str
    seconds: float
    queues: int
    in_flight: int
    read_iops: float
    write_iops: float
    other_iops: float
    read_bytes: float
    write_bytes: float
    errors: float
    kicks: float
    calls: float
    latency: Histogram

    @property
    def iops(self) -> float:
        return self.read_iops + self.write_iops + self.other_iops

    @property
    def p50_ns(self) -> int | None:
        return self.latency.percentile(0.50)

    @property
    def p99_ns(self) -> int | None:
        return self.latency.percentile(0.99)

    @property
    def p999_ns(self) -> int | None:
        return self.latency.percentile(0.999)


@dataclass(frozen=True, slots=True)
class ReactorRates:
    """Shares of the interval, 0..1."""

    core: int
    state: str
    queues: int
    busy: float
    idle: float
    asleep: float


@dataclass(frozen=True, slots=True)
class VolumeTotals:
    """Sums over a volume's queues since it was attached."""

    volume: str
    queues: int
    in_flight: int
    counters: dict[str, int]
    read_latency: Histogram
    write_latency: Histogram
    other_latency: Histogram


def totals(snapshot: Snapshot, volume: str) -> VolumeTotals:
    """Zero throughout when the volume is not attached."""
    queues = snapshot.of_volume(volume)
    none = Histogram()
    return VolumeTotals(
        volume=volume,
        queues=len(queues),
        in_flight=sum(queue.in_flight for queue in queues),
        counters={name: sum(getattr(queue, name) for queue in queues) for name in _SUMMED},
        read_latency=sum((queue.read_latency for queue in queues), none),
        write_latency=sum((queue.write_latency for queue in queues), none),
        other_latency=sum((queue.other_latency for queue in queues), none),
    )


def volume_rates(old: Snapshot, new: Snapshot) -> list[VolumeRates]:
    """By volume name, for those attached in `new`. A queue that `old` does not have began at zero in
    between."""
    before = {_key(queue): queue for queue in old.queues} if old.start_ns == new.start_ns else {}
    seconds = max((new.at_ns - old.at_ns) / 1e9, 1e-9)
    rates = []
    for volume in sorted({queue.volume for queue in new.queues}):
        queues = new.of_volume(volume)

        def rate(name: str, queues: tuple[QueueCounters, ...] = queues) -> float:
            grown = sum(getattr(queue, name) - getattr(before.get(_key(queue)), name, 0) for queue in queues)
            return float(grown / seconds)

        rates.append(
            VolumeRates(
                volume=volume,
                seconds=seconds,
                queues=len(queues),
                in_flight=sum(queue.in_flight for queue in queues),
                read_iops=rate("reads"),
                write_iops=rate("writes"),
                other_iops=rate("flushes") + rate("discards") + rate("zeroes") + rate("others"),
                read_bytes=rate("bytes_read"),
                write_bytes=rate("bytes_written"),
                errors=rate("errors"),
                kicks=rate("kicks"),
                calls=rate("calls"),
                latency=sum(
                    (_latency_since(queue, before.get(_key(queue))) for queue in queues), Histogram()
                ),
            )
        )
    return rates


def reactor_rates(old: Snapshot, new: Snapshot) -> list[ReactorRates]:
    """In the order of the engine's reactors, those that were removed among them. One that was added in between
    counts from zero, in a slot of its own or a removed one's."""
    before = old.reactors if old.start_ns == new.start_ns else ()
    pairs = itertools.zip_longest(before, new.reactors)
    return [
        _reactor_rates(one if one is not None and one.turns <= other.turns else None, other)
        for one, other in pairs
        if other is not None
    ]


def _key(queue: QueueCounters) -> tuple[str, int, int]:
    return queue.volume, queue.index, queue.generation


def _latency_since(new: QueueCounters, old: QueueCounters | None) -> Histogram:
    now = new.read_latency + new.write_latency + new.other_latency
    return now.since(old.read_latency + old.write_latency + old.other_latency) if old else now


def _reactor_rates(old: ReactorCounters | None, new: ReactorCounters) -> ReactorRates:
    busy = new.busy_ns - (old.busy_ns if old else 0)
    idle = new.idle_ns - (old.idle_ns if old else 0)
    asleep = new.asleep_ns - (old.asleep_ns if old else 0)
    # A reactor that slept through the interval may account for it only when it wakes.
    whole = max(busy + idle + asleep, 1)
    return ReactorRates(new.core, new.state, new.queues, busy / whole, idle / whole, asleep / whole)
