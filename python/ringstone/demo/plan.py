"""What the demo measures and checks, and the shape of its result. Times are ns unless the name says
otherwise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ringstone.hypervisor.fio import FioJob, Pattern

VOLUME = "demo"
POOL = "demo"
FIO_ENGINE = "io_uring"  # the guest image's kernel has it
VERIFY_BYTES = 64 << 20
MEASURED_BYTES = 256 << 20
_GIB = 1 << 30

AcceleratorChoice = Literal["auto", "kvm", "tcg"]
PoolType = Literal["file", "memory", "store"]


@dataclass(frozen=True)
class DemoOptions:
    """`seconds` per measured shape; `size` of the volume in bytes, at least 64 MiB; `folder` takes state,
    sockets and logs, a temporary one that is removed unless `keep`."""

    pool: PoolType = "file"
    size: int = _GIB
    seconds: float = 4.0
    accelerator: AcceleratorChoice = "auto"
    keep: bool = False
    folder: Path | None = None


@dataclass(frozen=True)
class Shape:
    """One measured load: its title for people and the fio job."""

    title: str
    job: FioJob


def fill(size: int) -> FioJob:
    """Writes what the shapes read: a thin volume answers reads of blocks that were never written from
    nothing."""
    return FioJob("fill", "write", block_size=1 << 20, depth=4, engine=FIO_ENGINE, size=_measured(size))


def shapes(seconds: float, size: int) -> list[Shape]:
    """The two shapes that virtual disks are compared by: one synchronous request at a time, where latency is
    all, and 4 jobs with 128 in flight each, where throughput is. `size` is the volume's, in bytes."""
    area = _measured(size)
    directions: list[tuple[Pattern, str]] = [("randread", "read"), ("randwrite", "write")]
    single = [
        Shape(
            f"4 KiB random {direction}, depth 1",
            FioJob(f"{pattern}-1", pattern, seconds=seconds, size=area),
        )
        for pattern, direction in directions
    ]
    deep = [
        Shape(
            f"4 KiB random {direction}, depth 128, 4 jobs",
            FioJob(
                f"{pattern}-128", pattern, depth=128, jobs=4, engine=FIO_ENGINE, seconds=seconds, size=area
            ),
        )
        for pattern, direction in directions
    ]
    return single + deep


def verified_write() -> FioJob:
    """Every block of the area written once in random order with a CRC-32C, then read back and checked."""
    return FioJob("verify", "randwrite", depth=32, engine=FIO_ENGINE, size=VERIFY_BYTES, verify="write")


def overwrite() -> FioJob:
    """Other blocks where the verified ones are."""
    return FioJob("overwrite", "randwrite", depth=32, engine=FIO_ENGINE, size=VERIFY_BYTES)


def _measured(size: int) -> int:
    return min(size, MEASURED_BYTES)


@dataclass(frozen=True)
class Latency:
    """A latency distribution. `bins` holds (lower edge, upper edge, requests)."""

    operations: int
    mean_ns: float
    p50_ns: int
    p99_ns: int
    p999_ns: int
    bins: list[tuple[int, int, int]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Measurement:
    """One shape, seen from both ends: by fio in the guest, and by the gateway from the poll that found a
    request to its used ring entry. `busy` is the share of the time that the reactors found work, 0..1."""

    title: str
    direction: Literal["read", "write"]
    iops: float
    bytes_per_second: float
    guest: Latency
    gateway: Latency | None
    busy: float


@dataclass(frozen=True)
class Check:
    """One thing that must hold; `detail` says what was seen."""

    title: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class DemoResult:
    """`setting` describes the machine and the volume as (name, value) lines; `folder` is what was kept, if
    anything."""

    setting: list[tuple[str, str]]
    measurements: list[Measurement]
    checks: list[Check]
    seconds: float
    folder: str | None = None

    @property
    def passed(self) -> bool:
        """Whether there were checks and all of them hold."""
        return bool(self.checks) and all(check.passed for check in self.checks)
