"""What a measurement asks for, and what it gives."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from ringstone.bench.reports import LoadReport
from ringstone.units import format_size

Pattern = Literal["random", "sequential"]
Wait = Literal["poll", "sleep"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A load: `depth` requests in flight in each of `queues` queues, `read_share` percent of them reads.
    `span_bytes` is how much of the volume is touched, 0 for all of it. `wait`: the client polls its used rings, or
    sleeps until the call, as a guest does. `packed`, `inflight` and `dirty_log` are for our own client alone; with any
    of them said it comes over another connection, so what is compared must all say one."""

    depth: int = 1
    queues: int = 1
    block_size: int = 4096
    read_share: int = 100
    pattern: Pattern = "random"
    span_bytes: int = 0
    wait: Wait = "poll"
    packed: bool = False
    inflight: bool | None = None
    dirty_log: bool = False

    def __str__(self) -> str:
        kind = {100: "read", 0: "write"}.get(self.read_share, f"{self.read_share} % read")
        queues = f", {self.queues} queues" if self.queues > 1 else ""
        return f"{format_size(self.block_size)} {self.pattern} {kind}, depth {self.depth}{queues}"

    def writing(self) -> "Shape":
        return replace(self, read_share=0)

    def on_drive(self) -> "Shape":
        """The same load for a file on a drive. The kernel completes writes to a file system in threads of its own, on
        the core that the drive interrupts; a client that polled there would make them wait for whole time slices."""
        return self if self.read_share == 100 else self.sleeping()

    def sleeping(self) -> "Shape":
        return replace(self, wait="sleep")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"event_idx": self.wait == "sleep"}


@dataclass(frozen=True, slots=True)
class Window:
    """How long one measurement counts, after how long a warm-up, in seconds."""

    seconds: float = 2.0
    warmup: float = 0.3


@dataclass(frozen=True, slots=True)
class ReactorUse:
    """From the stats page, over one measurement: what a request cost the reactors, and the share of their
    time that such requests took while they were measured."""

    busy_ns: float
    busy_share: float


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU time for each request, user and system, in nanoseconds: of the process that serves, its libraries' threads
    included; of its reactors alone, polling included; of the client's thread. What is in one process with the server
    is 0."""

    server_ns: float
    reactor_ns: float = 0.0
    client_ns: float = 0.0

    @property
    def ns(self) -> float:
        return self.server_ns + self.client_ns


@dataclass(frozen=True, slots=True)
class Measurement:
    """One round of one contender. `client_busy` is None where the contender has no client of ours."""

    iops: float
    mean_ns: float
    p99_ns: float
    client_busy: float | None = None
    reactor: ReactorUse | None = None
    cpu: CpuUse | None = None
    queue_p99_ns: tuple[float, ...] = ()
    queue_iops: tuple[float, ...] = ()
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, report: LoadReport, reactor: ReactorUse | None = None, cpu: CpuUse | None = None
    ) -> "Measurement":
        return cls(
            iops=report.iops,
            mean_ns=report.latency.mean_ns,
            p99_ns=report.latency.p99_ns,
            client_busy=report.client.busy_share,
            reactor=reactor,
            cpu=cpu,
            queue_p99_ns=tuple(queue.latency.p99_ns for queue in report.queues),
            queue_iops=tuple(queue.iops for queue in report.queues),
            raw=report.model_dump(mode="json", exclude_none=True),
        )


@dataclass(frozen=True, slots=True)
class Cores:
    """One for the side that serves, one for the side that asks."""

    server: int = 0
    client: int = 1


class Contender(Protocol):
    """Something that can be measured with a shape."""

    @property
    def name(self) -> str: ...

    def measure(self, shape: Shape, window: Window) -> Measurement:
        """RingstoneError when the measurement cannot be made."""
        ...
