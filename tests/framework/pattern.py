"""Load with a pattern in every block, by the independent client: whole runs, and runs beside which a test does
things to the backend."""

from contextlib import AbstractContextManager
from typing import Any

from ringstone.bench import pattern
from ringstone.bench.pattern import RunningPattern
from ringstone.bench.process import run_job
from ringstone.bench.reports import PatternReport

MIB = 1 << 20

_SPAN = 8 * MIB

__all__ = ["MIB", "RunningPattern", "run_pattern", "running_pattern"]


def run_pattern(socket: str, **more: Any) -> PatternReport:
    """A second of it, unless `more` says otherwise; RingstoneError when the job cannot be run to its end."""
    job = {"mode": "pattern", "socket": socket, "seconds": 1, "span_bytes": _SPAN, **more}
    return PatternReport.model_validate(run_job("load", job))


def running_pattern(socket: str, **more: Any) -> AbstractContextManager[RunningPattern]:
    """Enters when every queue has completed a request. Leaving it ends the load, has every block read back, and
    gives the report."""
    return pattern.running_pattern(socket, **({"span_bytes": _SPAN} | more))
