"""Clients with a pattern in every block (`mode: pattern`), each in a process of its own, beside which somebody does
things to the backend."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ringstone.bench.process import HeldJob, held_job
from ringstone.bench.reports import PatternReport
from ringstone.errors import RingstoneError

# The load ends when it is released; this only bounds a run whose owner has died.
_LONGEST_SECONDS = 600


class RunningPattern:
    """A job in a process of its own. `report` is there once the `with` block is left."""

    def __init__(self, job: HeldJob) -> None:
        self._job = job

    @property
    def pid(self) -> int:
        return self._job.pid

    @property
    def report(self) -> PatternReport:
        assert self._job.answer is not None, "the job runs until the with block is left"
        return PatternReport.model_validate(self._job.answer)


@contextmanager
def running_pattern(socket: str, **more: Any) -> Iterator[RunningPattern]:
    """Enters when every queue has completed a request. Leaving it ends the load, has every block read back, and
    gives the report. `more`: fields of the job."""
    with held_job({"mode": "pattern", "socket": socket, "seconds": _LONGEST_SECONDS, **more}) as job:
        yield RunningPattern(job)


def sound(report: PatternReport) -> PatternReport:
    """The report, or RingstoneError when an answer was wrong: figures of a broken run say nothing."""
    if not report.passed:
        raise RingstoneError(
            f"The pattern found what must not be: {'; '.join(report.findings[:3])}. Keep the gateway's log and "
            "see docs/benchmarks.md on findings."
        )
    return report
