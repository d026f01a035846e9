"""Clients with a pattern in every block (`mode: pattern`), each in a process of its own, beside which somebody does
things to the backend."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ringstone.bench.process import job_answer, module_command
from ringstone.bench.reports import PatternReport
from ringstone.errors import RingstoneError

# The load ends when it is released; this only bounds a run whose owner has died.
_LONGEST_SECONDS = 600


class RunningPattern:
    """A job in a process of its own. `report` is there once the `with` block is left."""

    def __init__(self, client: subprocess.Popen[str]) -> None:
        self._client = client
        self._report: PatternReport | None = None

    @property
    def pid(self) -> int:
        return self._client.pid

    @property
    def report(self) -> PatternReport:
        assert self._report is not None, "the job runs until the with block is left"
        return self._report

    def _finish(self) -> None:
        output, errors = self._client.communicate()
        self._report = PatternReport.model_validate(job_answer(output, errors, self._client.returncode))


@contextmanager
def running_pattern(socket: str, **more: Any) -> Iterator[RunningPattern]:
    """Enters when every queue has completed a request. Leaving it ends the load, has every block read back, and
    gives the report. `more`: fields of the job."""
    ready_read, ready_write = os.pipe()
    release_read, release_write = os.pipe()
    with os.fdopen(ready_read, "rb") as ready, os.fdopen(release_write, "wb") as release:
        fds = {"ready_fd": ready_write, "release_fd": release_read}
        job = {"mode": "pattern", "socket": socket, "seconds": _LONGEST_SECONDS, **fds, **more}
        with subprocess.Popen(
            module_command("client"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(ready_write, release_read),
        ) as client:
            os.close(ready_write)
            os.close(release_read)
            assert client.stdin is not None
            client.stdin.write(json.dumps({"call": "load", "config": job}))
            client.stdin.close()
            client.stdin = None
            running = RunningPattern(client)
            try:
                # Nothing is read when the job ended before; its error is raised below.
                if ready.read(1):
                    yield running
            finally:
                release.close()
                running._finish()


def sound(report: PatternReport) -> PatternReport:
    """The report, or RingstoneError when an answer was wrong: figures of a broken run say nothing."""
    if not report.passed:
        raise RingstoneError(
            f"The pattern found what must not be: {'; '.join(report.findings[:3])}. Keep the gateway's log and "
            "see docs/benchmarks.md on findings."
        )
    return report
