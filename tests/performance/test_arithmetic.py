"""The benchmarks' arithmetic: spreads, ratios, bars, and what the limit was."""

from dataclasses import replace

import pytest

from ringstone.bench.compare import Plan, Rounds, compare, iops, limited_by, mean_ns, reactor_busy_ns
from ringstone.bench.gateway import reactor_use
from ringstone.bench.shape import Measurement, ReactorUse, Shape, Window
from ringstone.bench.spread import Bar, Spread, interleave, paired_ratios
from ringstone.stats import decode
from tests.framework import stats_vector

PAGE = decode(stats_vector.golden_page())


def measured(iops: float, **more: object) -> Measurement:
    return replace(Measurement(iops=iops, mean_ns=1e9 / iops, p99_ns=2e9 / iops), **more)  # type: ignore[arg-type]


def test_a_spread_is_least_middle_and_greatest() -> None:
    assert Spread.of([9, 1, 3]) == Spread(1, 3, 9)
    assert Spread.of([4, 1]) == Spread(1, 2.5, 4)
    with pytest.raises(ValueError, match="nothing to take"):
        Spread.of([])


def test_ratios_are_taken_round_by_round() -> None:
    assert paired_ratios([10, 30], [5, 10]) == [2, 3]
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([10], [5, 10])
    with pytest.raises(ValueError, match="measured nothing"):
        paired_ratios([10], [0])


def test_contenders_take_turns() -> None:
    order = [(turn, index) for turn, index, _ in interleave(2, [lambda: "a", lambda: "b"])]
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("bar", "figure", "met"),
    [
        (Bar("", at_most=1.3), 1.3, True),
        (Bar("", at_most=1.3), 1.31, False),
        (Bar("", at_least=3), 3.0, True),
        (Bar("", at_least=3), 2.9, False),
    ],
)
def test_a_bar_includes_its_own_value(bar: Bar, figure: float, met: bool) -> None:
    assert bar.met(figure) is met


class Scripted:
    """A contender that gives what it was told to."""

    def __init__(self, name: str, *figures: float) -> None:
        self.name = name
        self.asked: list[tuple[Shape, Window]] = []
        self._figures = list(figures)

    def measure(self, shape: Shape, window: Window) -> Measurement:
        self.asked.append((shape, window))
        return measured(self._figures.pop(0))


def test_a_comparison_keeps_the_rounds_apart() -> None:
    reference, subject = Scripted("reference", 100, 200), Scripted("subject", 300, 500)
    lines: list[str] = []
    plan = Plan(rounds=2, window=Window(1.5, 0.25))
    first, second = compare([(reference, Shape()), (subject, Shape(depth=4))], plan, lines.append)
    assert (first.name, second.name) == ("reference", "subject")
    assert second.spread(iops) == Spread(300, 400, 500)
    assert second.ratio(first, iops) == Spread(2.5, 2.75, 3.0)
    assert second.ratio(first, mean_ns).maximum == pytest.approx(0.4)
    assert subject.asked == [(Shape(depth=4), Window(1.5, 0.25))] * 2
    assert lines[0] == "4 KiB random read, depth 1: round 1/2, reference: 100 IOPS"


def test_the_cost_of_a_request_is_busy_time_over_requests() -> None:
    reactor = replace(PAGE.reactors[0], busy_ns=PAGE.reactors[0].busy_ns + 50_000)
    queue = replace(PAGE.queues[0], reads=PAGE.queues[0].reads + 90, writes=PAGE.queues[0].writes + 10)
    after = replace(PAGE, reactors=(reactor,), queues=(queue, *PAGE.queues[1:]))
    before = replace(PAGE, reactors=PAGE.reactors[:1])
    assert reactor_use(before, after, iops=1_000_000) == ReactorUse(busy_ns=500, busy_share=0.5)
    assert reactor_use(before, after, iops=4_000_000) == ReactorUse(busy_ns=500, busy_share=1.0)
    assert reactor_use(after, after, iops=1) is None


@pytest.mark.parametrize(
    ("client", "reactor", "depth", "device", "words"),
    [
        (0.9, ReactorUse(300, 0.6), 32, False, "the client is saturated"),
        (0.5, ReactorUse(600, 0.95), 32, False, "the reactor is saturated at 600 ns"),
        (0.1, ReactorUse(600, 0.2), 32, True, "the drive"),
        (0.1, ReactorUse(600, 0.4), 1, False, "600 ns of a round are the reactor's"),
        (0.4, ReactorUse(600, 0.5), 32, False, "neither side alone"),
        (0.4, None, 32, False, "reactor unknown busy"),
    ],
)
def test_what_the_limit_was_follows_from_who_was_busy(
    client: float, reactor: ReactorUse | None, depth: int, device: bool, words: str
) -> None:
    one = measured(1e6, client_busy=client, reactor=reactor)
    assert words in limited_by(Rounds("ringstone", Shape(depth=depth), (one,)), device=device)


def test_a_figure_that_some_rounds_lack_is_the_median_of_the_others() -> None:
    rounds = [measured(1), measured(1, reactor=ReactorUse(5, 0.1)), measured(1, reactor=ReactorUse(7, 0.1))]
    assert Rounds("ringstone", Shape(), tuple(rounds)).middle(reactor_busy_ns) == 6
    assert Rounds("ringstone", Shape(), tuple(rounds[:1])).middle(reactor_busy_ns) is None


def test_a_shape_says_what_it_is() -> None:
    assert str(Shape(depth=8, queues=4)) == "4 KiB random read, depth 8, 4 queues"
    assert str(Shape(read_share=70, pattern="sequential")) == "4 KiB sequential 70 % read, depth 1"
    assert str(Shape(block_size=65536).writing()) == "64 KiB random write, depth 1"
