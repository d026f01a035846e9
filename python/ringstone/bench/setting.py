"""Where and how measurements run."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ringstone.bench.compare import Plan, Progress
from ringstone.bench.load import GIB
from ringstone.bench.shape import Cores
from ringstone.errors import InvalidError, UnsupportedError
from ringstone.stopping import Stopping


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
    realtime: bool = False

    def ahead(self) -> AbstractContextManager[None]:
        """With `realtime` ahead of other work. Not for files on a drive: the kernel's workers, which finish some of
        their I/O, would be shut out by the threads that poll."""
        return first_come_first_served() if self.realtime else nullcontext()


@contextmanager
def first_come_first_served() -> Iterator[None]:
    """Run this process and the children it starts ahead of all ordinary ones (SCHED_FIFO), so that other
    work on the machine does not take their cores away. UnsupportedError for a user who may not."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError as error:
        raise UnsupportedError(
            "--realtime needs the right to use SCHED_FIFO. Run as root, or without it on a quiet machine."
        ) from error
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@contextmanager
def prepared(
    *,
    cores: Cores,
    plan: Plan,
    progress: Progress,
    size: int = GIB,
    tmpfs: Path = Path("/dev/shm"),
    disk: Path = Path("/var/tmp"),
    realtime: bool = False,
) -> Iterator[Setting]:
    """A setting with directories of its own, removed at the end. Ctrl-C and SIGTERM end the run so that files,
    children and hugepages are given back. `realtime`: see Setting.ahead."""
    available = os.sched_getaffinity(0)
    for role, core in (("server", cores.server), ("client", cores.client)):
        if core not in available:
            raise InvalidError(
                f"Core {core} for the {role} is not among this process's cores "
                f"({', '.join(map(str, sorted(available)))}). Choose one with --{role}-core."
            )
    if cores.server == cores.client:
        raise InvalidError("Server and client both poll, so each needs a core of its own.")

    with (
        Stopping(),
        tempfile.TemporaryDirectory(prefix="ringstone-bench-", dir=tmpfs) as directory,
        tempfile.TemporaryDirectory(prefix="ringstone-bench-", dir=disk) as on_disk,
    ):
        yield Setting(Path(directory), Path(on_disk), cores, plan, progress, size, realtime)
