"""The rows on crashes, upgrades, many cores and hostile neighbours: what is reckoned from what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ringstone.bench import resilience
from ringstone.bench.compare import Plan, Rounds
from ringstone.bench.daemon import Start, drain_ms
from ringstone.bench.neighbours import reactor_p99
from ringstone.bench.reports import PatternReport
from ringstone.bench.resilience import Part, chosen
from ringstone.bench.results import Results, Row
from ringstone.bench.rings import cost_change, require_ringstone
from ringstone.bench.scaling import ReactorShare, describe, iops_of_core, reactor_shares, running
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Cores, Measurement, ReactorUse, Shape
from ringstone.bench.spread import Bar, Spread
from ringstone.bench.stalls import QueuePause, Seen, crash_pause
from ringstone.errors import InvalidError, RingstoneError, StateError
from ringstone.stats import Histogram, decode
from tests.framework import stats_vector
from tests.performance.test_results import MACHINE

PAGE = decode(stats_vector.golden_page())
MS = 1_000_000


def latency(p999_ns: int) -> dict[str, Any]:
    return {"count": 1, "mean_ns": 1.0, "p50_ns": 1, "p99_ns": 1, "p999_ns": p999_ns, "max_ns": p999_ns}


def pattern(**more: Any) -> PatternReport:
    report = {
        "mode": "pattern",
        "passed": True,
        "seconds": 1.0,
        "started_monotonic_ns": 10_000 * MS,
        "operations": {"read": 1, "write": 1, "flush": 0},
        "iops": 2.0,
        **dict.fromkeys(("errors", "lost", "wrong", "torn", "doubled", "stuck"), 0),
        "findings": [],
        **dict.fromkeys(("reads_checked", "mixed", "blocks_written", "blocks_checked"), 0),
        "inflight_region": True,
        "reconnects": 0,
        "outages": [],
        "missed_calls": 0,
        "latency": latency(1000),
        "longest_gap_ns": 3 * MS,
        "queue_gaps_ns": [3 * MS],
        "queue_latency": [latency(1000)],
        "gaps": [],
        "cpu_seconds": 0.1,
    }
    return PatternReport.model_validate(report | more)


def test_the_pause_of_a_crash_falls_into_its_parts() -> None:
    report = pattern(
        outages=[{"start_ns": 501 * MS, "duration_ns": 279 * MS}],
        gaps=[
            {"start_ns": 100 * MS, "duration_ns": 4 * MS},
            {"start_ns": 499 * MS, "duration_ns": 283 * MS},
            # Later than the outage, and none of it.
            {"start_ns": 900 * MS, "duration_ns": 5 * MS},
        ],
        longest_gap_ns=283 * MS,
    )
    start = Start(began=10_505 * MS, ready=11_200 * MS, listening=10_765 * MS)
    pause = crash_pause(report, killed_ns=10_500 * MS, start=start)
    parts = (pause.gap_ns, pause.listening_ns, pause.reconnect_ns, pause.first_ns)
    assert [part / MS for part in parts] == [283, 265, 15, 2]


def test_a_client_that_lost_its_backend_twice_measured_no_crash() -> None:
    outage = {"start_ns": 1, "duration_ns": 1}
    with pytest.raises(RingstoneError, match="2 times instead of once"):
        crash_pause(pattern(outages=[outage, outage]), 0, Start(0, 1, 1))


def test_the_worst_client_speaks_for_all() -> None:
    reports = [pattern(), pattern(longest_gap_ns=9 * MS, latency=latency(500))]
    assert Seen.of(reports) == Seen(gap_ms=9.0, p999_us=1.0)


def test_the_moved_queue_is_the_first() -> None:
    gaps, tails = [7 * MS, 1 * MS, 2 * MS], [latency(9000), latency(2000), latency(1000)]
    assert QueuePause.of(pattern(queue_gaps_ns=gaps, queue_latency=tails)) == QueuePause(7, 9, 2, 2)


def test_the_drain_is_read_from_the_log_of_the_process_before() -> None:
    line = "Handed 8 volumes over to release 2; their requests paused for 8.4 ms, {} of them to come to rest."
    assert drain_ms(f"{line.format(3.5)}\n{line.format(1.25)}") == 1.25
    with pytest.raises(StateError, match="does not tell"):
        drain_ms("Handed nothing over.")


def test_requests_are_counted_for_the_reactor_of_their_queue() -> None:
    reactors = tuple(replace(PAGE.reactors[0], core=core, busy_ns=core * 1000) for core in (0, 1))
    queues = tuple(replace(PAGE.queues[0], index=index, reactor=index % 2) for index in range(3))
    before = replace(PAGE, reactors=reactors, queues=queues)
    after = replace(
        PAGE,
        reactors=tuple(replace(reactor, busy_ns=reactor.busy_ns + 6000) for reactor in reactors),
        queues=(
            *(replace(queue, reads=queue.reads + 10 * (queue.index + 1)) for queue in queues),
            # Set up in between: its requests are older than the reading, or not all of them seen.
            replace(PAGE.queues[0], index=3, reactor=1, reads=1_000_000),
        ),
    )
    first, second = reactor_shares(before, after)
    assert (first, second) == (ReactorShare(0, 40, 6000), ReactorShare(1, 20, 6000))
    assert (first.busy_ns_each, ReactorShare(0, 0, 5).busy_ns_each) == (150, 0)


def test_only_readings_with_all_queues_running_count() -> None:
    queues = tuple(replace(PAGE.queues[0], volume="v", index=index, reactor=0) for index in range(2))
    whole = replace(PAGE, queues=queues)
    stopped = replace(PAGE, queues=(queues[0], replace(queues[1], reactor=None)))
    assert running([stopped, whole, stopped], "v", 2) == [whole]
    assert running([stopped, whole], "v", 1) == [stopped, whole]


def test_a_core_gives_as_much_as_its_busy_time_allows() -> None:
    assert iops_of_core(400) == 2_500_000


def measured(busy_ns: float | None, **raw: Any) -> Measurement:
    reactor = ReactorUse(busy_ns, 0.5) if busy_ns is not None else None
    return Measurement(iops=1.0, mean_ns=1.0, p99_ns=1.0, client_busy=0.5, reactor=reactor, raw=raw)


def test_what_reactors_and_client_did_is_said() -> None:
    reactors = [{"core": 1, "operations": 10, "busy_ns": 3000}, {"core": 0, "operations": 0, "busy_ns": 9}]
    rounds = Rounds("two", Shape(), (measured(300, reactors=reactors), measured(None)))
    assert describe(rounds) == "core 1 300 ns busy per request, client 50% busy"
    assert describe(Rounds("two", Shape(), (measured(None),))).startswith("reactors unknown")


def test_what_a_request_costs_before_and_after_is_said() -> None:
    before, after = Rounds("a", Shape(), (measured(300),)), Rounds("b", Shape(), (measured(330),))
    assert cost_change(before, after) == "reactor busy 300 ns to 330 ns per request"
    assert "unknown" in cost_change(before, Rounds("c", Shape(), (measured(None),)))


def test_p99_in_the_reactor_is_that_of_the_window() -> None:
    queue = replace(PAGE.queues[0], volume="quiet", read_latency=Histogram({5: 1000, 90: 7}))
    before = replace(PAGE, queues=(queue,))
    grown = replace(queue, read_latency=Histogram({5: 1000, 7: 99, 90: 8}))
    assert reactor_p99(before, replace(PAGE, queues=(grown,)), "quiet") == 7
    with pytest.raises(RingstoneError, match="Nothing was served to quiet"):
        reactor_p99(before, before, "quiet")


def test_rows_are_judged_by_ratio_or_figure_or_not_at_all() -> None:
    by_ratio = Row.beside("s", "w", "ms", [10, 30], ("r", [5, 10]), "l", Bar("at most 2", at_most=2))
    assert (by_ratio.judged, by_ratio.passed, by_ratio.ratio) == (2.5, False, Spread(2, 2.5, 3))
    by_figure = Row.beside("s", "w", "ms", [10, 30], ("r", [5, 10]), "l", Bar("", at_most=20), judge="figure")
    assert (by_figure.judged, by_figure.passed) == (20, True)
    told = Row.told("s", "w", "ms", [1, 2], "l")
    assert (told.passed, told.bar) == (None, "-")
    beside_nothing = Row.beside("s", "w", "%", [1.0], ("r", [0.0]), "l", Bar("", at_most=1), judge="figure")
    assert (beside_nothing.ratio, beside_nothing.passed) == (None, True)
    with pytest.raises(ValueError, match="measured nothing"):
        Row.beside("s", "w", "ms", [1.0], ("r", [0.0]), "l", Bar("", at_most=1))
    results = Results(name="resilience", plan="", machine=MACHINE, rows=[by_ratio, by_figure, told])
    assert (results.verdict, results.passed) == ("1 of 2 bars met", False)


def test_each_suite_keeps_its_tables(tmp_path: Path) -> None:
    """The README held one suite only, and a run of another one would have thrown its tables away."""
    rows = [Row.told("old section", "w", "ms", [1], "l")]
    older = MACHINE.model_copy(update={"at": "2029-01-01T00:00:00+0000"})
    for machine in (older, MACHINE):
        Results(name="gateway", plan="", machine=machine, rows=rows).write(tmp_path)
    mine = Results(name="resilience", command="ringstone bench resilience", plan="", machine=MACHINE)
    mine.rows = [Row.told("crash", "w", "ms", [2], "l")]
    assert json.loads(mine.write(tmp_path).read_text())["name"] == "resilience"
    text = (tmp_path / "README.md").read_text()
    order = (
        "`ringstone bench suite`",
        "### Old section",
        "`ringstone bench resilience`",
        "### Crash",
        "- [2029",
    )
    assert sorted(order, key=text.index) == list(order)


def test_an_earlier_release_is_asked_for_with_its_directory(tmp_path: Path) -> None:
    assert Part.EARLIER not in chosen(None, None)
    assert chosen([Part.EARLIER, Part.CRASH], tmp_path) == [Part.CRASH, Part.EARLIER]
    with pytest.raises(InvalidError, match="--against"):
        chosen([Part.EARLIER], None)
    with pytest.raises(InvalidError, match="There is no Ringstone in"):
        require_ringstone(tmp_path)


def test_a_part_that_fails_does_not_cost_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(setting: Setting, results: Results) -> None:
        raise RingstoneError("It broke.")

    def sound(setting: Setting, results: Results) -> None:
        results.rows.append(Row.told("s", "w", "ms", [1], "l"))

    monkeypatch.setattr(resilience, "_PARTS", {Part.CRASH: broken, Part.IDLE: sound})
    setting = Setting(tmp_path, tmp_path, Cores(), Plan(), lambda text: None)
    results = Results(name="resilience", plan="", machine=MACHINE)
    resilience.run([Part.CRASH, Part.IDLE], None, setting, results)
    assert len(results.rows) == 1
    assert results.notes == ["**Not measured to its end: crash.** It broke."]
    with pytest.raises(RingstoneError, match="It broke"):
        resilience.run([Part.CRASH], None, setting, results)
