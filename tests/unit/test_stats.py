"""The decoder of the stats page against the golden vector, and the histogram's arithmetic."""

import random
import struct
from pathlib import Path

import pytest

from ringstone.errors import StateError
from ringstone.stats import BUCKETS, Histogram, StatsPage, bucket_edges, bucket_of, decode
from tests.framework import stats_vector


def test_the_golden_file_is_what_its_generator_writes() -> None:
    assert stats_vector.PATH.read_bytes() == stats_vector.golden_page()


def test_the_header_and_the_reactors_are_read() -> None:
    snapshot = decode(stats_vector.PATH.read_bytes())
    assert (snapshot.pid, snapshot.start_ns) == (4242, 1_700_000_000_123_456_789)
    first, second = snapshot.reactors
    assert (first.core, first.state) == (3, "polling")
    assert (first.busy_ns, first.idle_ns, first.asleep_ns, first.turns) == (1008, 1016, 1024, 1032)
    assert (first.enters, first.submitted, first.reaped, first.wakeups) == (1040, 1048, 1056, 1064)
    assert (first.messages, first.queues, first.calls) == (1072, 1080, 1088)
    assert (second.core, second.state, second.asleep_ns, second.busy_ns) == (5, "asleep", (1 << 64) - 1, 0)


def test_queues_are_read_and_unfinished_or_free_slots_left_out() -> None:
    alpha, full = decode(stats_vector.PATH.read_bytes()).queues
    assert (alpha.volume, alpha.index, alpha.reactor, alpha.entries, alpha.generation) == (
        "alpha",
        0,
        1,
        256,
        6,
    )
    assert (alpha.in_flight, alpha.reads, alpha.writes, alpha.flushes) == (2088, 2096, 2104, 2112)
    assert (alpha.discards, alpha.zeroes, alpha.others) == (2120, 2128, 2136)
    assert alpha.operations == 2096 + 2104 + 2112 + 2120 + 2128 + 2136
    assert (alpha.bytes_read, alpha.bytes_written, alpha.bytes_discarded) == (2144, 2152, 2160)
    assert (alpha.errors, alpha.bounces, alpha.kicks, alpha.calls) == (2168, 2176, 2184, 2192)
    assert alpha.read_latency == Histogram({0: 1, 7: 1, 8: 1, 63: 1, 143: 10})
    assert alpha.write_latency == Histogram({319: 2})
    assert alpha.other_latency == Histogram()
    assert (full.volume, full.index, full.reactor, full.entries) == ("z" * 63, 63, None, 0)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"RSSTATS2"),
        (8, struct.pack("<I", 2)),
        (32, struct.pack("<I", 1 << 20)),
        (48, struct.pack("<I", 5)),
    ],
    ids=["magic", "version", "too many reactors", "too many queues"],
)
def test_a_page_that_is_not_ours_is_refused(at: int, value: bytes) -> None:
    page = bytearray(stats_vector.golden_page())
    page[at : at + len(value)] = value
    with pytest.raises(StateError):
        decode(bytes(page))


def test_a_cut_page_is_refused() -> None:
    for length in (0, 63, 4096, len(stats_vector.golden_page()) - 1):
        with pytest.raises(StateError):
            decode(stats_vector.golden_page()[:length])


def test_a_mapped_page_shows_what_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    path.write_bytes(stats_vector.golden_page())
    with StatsPage(path) as page, path.open("r+b") as writer:
        before = page.read()
        writer.seek(stats_vector.QUEUES_AT + 96)
        writer.write(struct.pack("<Q", 5000))
        writer.flush()
        after = page.read()
    assert (before.queues[0].reads, after.queues[0].reads) == (2096, 5000)
    assert after.at_ns > before.at_ns


def test_buckets_hold_what_their_edges_say() -> None:
    edge = 0
    for bucket in range(BUCKETS):
        lower, upper = bucket_edges(bucket)
        assert lower == edge, f"bucket {bucket} leaves a gap"
        assert (bucket_of(lower), bucket_of(upper)) == (bucket, bucket)
        assert bucket < 8 or (upper + 1 - lower) / lower <= 0.125
        edge = upper + 1
    assert bucket_of(edge) == bucket_of(1 << 63) == BUCKETS - 1


def test_percentiles_never_lie_below_the_true_latency_nor_far_above() -> None:
    chance = random.Random(7)
    latencies = sorted(int(chance.lognormvariate(9, 2)) for _ in range(5000))
    buckets: dict[int, int] = {}
    for latency in latencies:
        buckets[bucket_of(latency)] = buckets.get(bucket_of(latency), 0) + 1
    histogram = Histogram(buckets)
    assert histogram.count == 5000
    for share in (0.001, 0.5, 0.9, 0.99, 0.999, 1.0):
        true = latencies[max(round(share * 5000), 1) - 1]
        measured = histogram.percentile(share)
        assert measured is not None
        assert true <= measured <= true * 1.125


def test_histograms_add_and_subtract() -> None:
    older, newer = Histogram({1: 2, 9: 1}), Histogram({1: 2, 9: 4, 20: 1})
    assert newer.since(older) == Histogram({9: 3, 20: 1})
    assert older + Histogram({1: 1, 3: 1}) == Histogram({1: 3, 3: 1, 9: 1})
    assert Histogram().percentile(0.5) is None
    assert Histogram().mean() is None
    assert Histogram({4: 1, 6: 3}).mean() == 5.5
