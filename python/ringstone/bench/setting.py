"""Where and how measurements run."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ringstone.bench.compare import Plan, Progress
from ringstone.bench.load import GIB
from ringstone.bench.shape import Cores
from ringstone.errors import InvalidError


@dataclass(frozen=True, slots=True)
class Setting:
    """`directory` is for this run alone and on tmpfs where there is one, `disk` on the drive to measure.
    `size` is that of every volume, in bytes."""

    directory: Path
    disk: Path
    cores: Cores
    plan: Plan
    progress: Progress
    size: int = GIB


@contextmanager
def prepared(
    *,
    cores: Cores,
    plan: Plan,
    progress: Progress,
    size: int = GIB,
    tmpfs: Path = Path("/dev/shm"),
    disk: Path = Path("/var/tmp"),
) -> Iterator[Setting]:
    """A setting with directories of its own, removed at the end. Being terminated ends the run as Ctrl-C
    does, so that files, children and hugepages are given back."""
    available = os.sched_getaffinity(0)
    for role, core in (("server", cores.server), ("client", cores.client)):
        if core not in available:
            raise InvalidError(
                f"Core {core} for the {role} is not among this process's cores "
                f"({', '.join(map(str, sorted(available)))}). Choose one with --{role}-core."
            )
    if cores.server == cores.client:
        raise InvalidError("Server and client both poll, so each needs a core of its own.")

    def terminated(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, terminated)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ringstone-bench-", dir=tmpfs) as directory,
            tempfile.TemporaryDirectory(prefix="ringstone-bench-", dir=disk) as on_disk,
        ):
            yield Setting(Path(directory), Path(on_disk), cores, plan, progress, size)
    finally:
        signal.signal(signal.SIGTERM, former)
