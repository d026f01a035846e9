"""CPU time of a process under load: sampled beside it, and read off the middle, where the load is steady."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from ringstone.bench.process import cpu_seconds
from ringstone.errors import RingstoneError, UnsupportedError

_SAMPLE_SECONDS = 0.01
_REACTOR = "reactor-"


class Meter:
    """Entered before the load, left after it has ended. The process may end with the load, as fio does."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._reactors = _reactors(pid)
        # Monotonic time, CPU of the process, CPU of its reactors; seconds.
        self._samples: list[tuple[float, float, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            try:
                used, reactors = cpu_seconds(self._pid), sum(map(_thread_seconds, self._reactors))
            except (UnsupportedError, OSError):
                return
            self._samples.append((time.monotonic(), used, reactors))

    def cores(self, seconds: float) -> tuple[float, float]:
        """CPU seconds a second of the process and of its reactors alone, in the middle half of a load of `seconds` that
        ended when the meter was left. RingstoneError when it was shorter than two samples."""
        left = self._samples[-1][0] if self._samples else 0.0
        inside = [one for one in self._samples if 0.25 * seconds <= left - one[0] <= 0.75 * seconds]
        if len(inside) < 2:
            raise RingstoneError(f"The CPU time of process {self._pid} was not seen. Measure for longer.")
        (began, process, reactors), (ended, process_end, reactors_end) = inside[0], inside[-1]
        return (process_end - process) / (ended - began), (reactors_end - reactors) / (ended - began)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


def _reactors(pid: int) -> list[Path]:
    """Where the kernel tells of the threads of a process that are reactors."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [thread / "schedstat" for thread in threads if (thread / "comm").read_text().startswith(_REACTOR)]


def _thread_seconds(schedstat: Path) -> float:
    return int(schedstat.read_text().split()[0]) / 1e9
