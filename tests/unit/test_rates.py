"""Rates from two readings: what is counted between them and nothing else."""

from dataclasses import replace

import pytest

from ringstone.rates import reactor_rates, totals, volume_rates
from ringstone.stats import Histogram, Snapshot, decode
from tests.framework import stats_vector

OLD = decode(stats_vector.golden_page(), at_ns=1_000_000_000)


def later(seconds: float, **counted: int) -> Snapshot:
    """OLD after `seconds`, with queue 0's counters raised by `counted` and as many reads of 1 ms."""
    queue = OLD.queues[0]
    reads = counted.get("reads", 0)
    raised = replace(
        queue,
        **{name: getattr(queue, name) + value for name, value in counted.items()},
        read_latency=queue.read_latency + Histogram({143: reads} if reads else {}),
    )
    return replace(OLD, at_ns=OLD.at_ns + int(seconds * 1e9), queues=(raised, *OLD.queues[1:]))


def test_rates_are_differences_over_time() -> None:
    alpha, other = volume_rates(OLD, later(2, reads=200, writes=50, flushes=4, bytes_read=819_200, errors=2))
    assert (alpha.volume, alpha.seconds, alpha.in_flight) == ("alpha", 2.0, 2088)
    assert (alpha.read_iops, alpha.write_iops, alpha.other_iops, alpha.iops) == (100, 25, 2, 127)
    assert (alpha.read_bytes, alpha.write_bytes, alpha.errors) == (409_600, 0, 1)
    assert alpha.latency == Histogram({143: 200})
    assert alpha.p50_ns == alpha.p999_ns == 1_048_575
    assert (other.iops, other.p50_ns) == (0, None)


def test_a_queue_attached_in_between_counts_from_zero() -> None:
    queue = OLD.queues[0]
    again = replace(queue, generation=queue.generation + 2, reads=30, read_latency=Histogram({8: 30}))
    new = replace(OLD, at_ns=OLD.at_ns + 1_000_000_000, queues=(again,))
    (alpha,) = volume_rates(OLD, new)
    assert (alpha.read_iops, alpha.latency.count) == (30, 30 + queue.write_latency.count)


def test_a_restarted_engine_counts_from_zero() -> None:
    new = replace(later(1), start_ns=OLD.start_ns + 1)
    assert volume_rates(OLD, new)[0].read_iops == OLD.queues[0].reads


def test_busy_shares_add_up_to_one() -> None:
    first = replace(OLD.reactors[0], busy_ns=1008 + 250, idle_ns=1016 + 250, asleep_ns=1024 + 500)
    new = replace(OLD, reactors=(first, OLD.reactors[1]))
    moving, still = reactor_rates(OLD, new)
    assert (moving.busy, moving.idle, moving.asleep) == (0.25, 0.25, 0.5)
    assert (still.busy, still.idle, still.asleep) == (0, 0, 0)


def test_a_reactor_added_in_between_counts_from_zero() -> None:
    """Rates were once negative, as it had taken the slot of one that had been removed."""
    fresh = replace(OLD.reactors[0], busy_ns=30, idle_ns=10, asleep_ns=0, turns=1)
    first, _, third = reactor_rates(OLD, replace(OLD, reactors=(fresh, OLD.reactors[1], fresh)))
    assert (first.busy, first.idle) == (third.busy, third.idle) == (0.75, 0.25)


def test_totals_sum_over_a_volumes_queues() -> None:
    second = replace(OLD.queues[0], index=1, reads=4)
    both = replace(OLD, queues=(*OLD.queues, second))
    sums = totals(both, "alpha")
    assert (sums.queues, sums.counters["reads"], sums.read_latency.count) == (2, 2100, 28)
    assert totals(both, "nobody").counters["reads"] == 0


@pytest.mark.parametrize("same", [True, False])
def test_no_time_between_readings_is_no_division_by_zero(same: bool) -> None:
    assert volume_rates(OLD, OLD if same else later(0, reads=1))[0].seconds > 0
