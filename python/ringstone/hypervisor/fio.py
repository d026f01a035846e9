"""fio in the guest: a job as arguments, its result from fio's JSON (`--output-format=json+`, with latency
bins)."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Pattern = Literal["read", "write", "randread", "randwrite", "randrw", "trim", "randtrim"]


@dataclass(frozen=True)
class FioJob:
    """What fio does. `block_size` and `size` are bytes per request and per job, `depth` requests in flight
    per job.

    With `seconds` the job runs that long, over and over the same area; without, it goes over `size` once.
    `verify`: "write" writes blocks with a CRC-32C header and reads them back, "only" reads back what an
    earlier identical job with "write" wrote.
    """

    name: str
    pattern: Pattern
    block_size: int = 4096
    depth: int = 1
    jobs: int = 1
    engine: str = "psync"
    seconds: float = 0
    size: int | None = None
    filename: str = "/dev/vda"
    direct: bool = True
    verify: Literal["none", "write", "only"] = "none"
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class FioDirection:
    """Reads or writes of a job. Times are ns, from submission to completion; `histogram` holds (ns,
    requests)."""

    operations: int
    iops: float
    bytes_per_second: float
    mean_ns: float
    percentiles_ns: dict[float, int] = field(default_factory=dict)
    histogram: list[tuple[int, int]] = field(default_factory=list)

    def percentile_ns(self, share: float) -> int:
        """The latency that `share` percent of the requests stayed under; 50, 99 and 99.9 are there."""
        return self.percentiles_ns[share]


@dataclass(frozen=True)
class FioResult:
    """All jobs together; a direction without requests has 0 operations."""

    version: str
    errors: int
    read: FioDirection
    write: FioDirection
    raw: dict[str, Any]

    @property
    def operations(self) -> int:
        """Reads and writes."""
        return self.read.operations + self.write.operations


def fio_command(job: FioJob) -> str:
    """The shell command of a job."""
    arguments = [
        "fio",
        "--output-format=json+",
        "--group_reporting",
        "--thread",
        "--percentile_list=50:90:99:99.9",
        f"--name={job.name}",
        f"--filename={job.filename}",
        f"--rw={job.pattern}",
        f"--bs={job.block_size}",
        f"--ioengine={job.engine}",
        f"--iodepth={job.depth}",
        f"--numjobs={job.jobs}",
        f"--direct={int(job.direct)}",
    ]
    if job.seconds:
        arguments += ["--time_based", f"--runtime={round(job.seconds * 1000)}ms"]
    if job.size is not None:
        arguments.append(f"--size={job.size}")
    if job.verify != "none":
        # A block without its header, or another block's, fails; verify_fatal stops at the first.
        arguments += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=20240229"]
        arguments += ["--do_verify=1", "--end_fsync=1"] if job.verify == "write" else ["--verify_only"]
    return shlex.join([*arguments, *job.extra])


def parse_fio(output: str) -> FioResult:
    """fio's JSON, after any lines that fio printed before it. Raises ValueError when there is none."""
    start = output.find("{")
    if start < 0:
        raise ValueError(f"fio printed no JSON but: {output.strip()[:500] or 'nothing'}")
    raw: dict[str, Any] = json.loads(output[start:])
    job = raw["jobs"][0]
    return FioResult(
        version=raw["fio version"],
        errors=int(job["error"]),
        read=_direction(job["read"]),
        write=_direction(job["write"]),
        raw=raw,
    )


def _direction(stats: dict[str, Any]) -> FioDirection:
    # Rings' engines report completion latency, synchronous ones count submission into it.
    latency = stats["clat_ns"]
    bins: Iterable[tuple[str, int]] = latency.get("bins", {}).items()
    return FioDirection(
        operations=int(stats["total_ios"]),
        iops=float(stats["iops"]),
        bytes_per_second=float(stats["bw_bytes"]),
        mean_ns=float(latency["mean"]),
        percentiles_ns={float(share): int(ns) for share, ns in latency.get("percentile", {}).items()},
        histogram=sorted((int(ns), int(count)) for ns, count in bins if count),
    )
