"""Our client on a vhost-user-blk socket, and the bare ring."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringstone.bench.process import run_job
from ringstone.bench.reports import LoadReport
from ringstone.bench.shape import Cores, Measurement, Shape, Window
from ringstone.errors import StorageError

GIB = 1 << 30


def drive(socket: Path, shape: Shape, window: Window, cores: Cores | None, **more: Any) -> LoadReport:
    """Load on whatever listens at `socket`, bound to the client core if `cores` are given; `more` are further fields of
    the job.

    A measurement in which a request failed, or none was completed, says nothing, so that is a StorageError.
    """
    job = {
        "mode": "load",
        "socket": str(socket),
        "seconds": window.seconds,
        "warmup_seconds": window.warmup,
        "cores": [cores.client] if cores is not None else [],
    }
    report = LoadReport.model_validate(run_job("load", job | shape.as_dict() | more))
    if not report.operations:
        raise StorageError(
            f"No request at {socket} completed in {window.seconds:g} s. See whether the backend still runs."
        )
    if report.errors:
        raise StorageError(
            f"{report.errors} of {report.operations} requests at {socket} failed. See the backend's log."
        )
    return report


@dataclass(frozen=True, slots=True)
class Socket:
    """A backend that somebody else runs."""

    path: Path
    cores: Cores

    @property
    def name(self) -> str:
        return str(self.path)

    def measure(self, shape: Shape, window: Window) -> Measurement:
        return Measurement.of(drive(self.path, shape, window, self.cores))


@dataclass(frozen=True, slots=True)
class BareRing:
    """The shared-memory ring between the two cores with one copy per request and nothing else."""

    cores: Cores
    volume_bytes: int = GIB
    hugepages: bool = True

    @property
    def name(self) -> str:
        return "bare ring" if self.hugepages else "bare ring on 4 KiB pages"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        job = {
            "seconds": window.seconds,
            "warmup_seconds": window.warmup,
            "depth": shape.depth * shape.queues,
            "block_size": shape.block_size,
            "read_share": shape.read_share,
            "pattern": shape.pattern,
            "volume_bytes": shape.span_bytes or self.volume_bytes,
            "server_core": self.cores.server,
            "client_core": self.cores.client,
            "hugepages": "auto" if self.hugepages else "off",
        }
        return Measurement.of(LoadReport.model_validate(run_job("limit", job)))
