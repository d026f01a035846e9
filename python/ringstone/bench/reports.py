"""What the load generator (crates/load) answers. Latencies are nanoseconds, sizes bytes."""

from pydantic import BaseModel


class Latency(BaseModel):
    count: int
    mean_ns: float
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int


class QueueReport(BaseModel):
    index: int
    operations: int
    errors: int
    iops: float
    latency: Latency


class ClientReport(BaseModel):
    """`busy_share` is the share of the time the client spent reaping and submitting, not waiting with its
    whole depth in flight; `batch` is how many completions it found at once."""

    threads: int
    busy_share: float
    batch: float
    cpu_seconds: float


class MemoryReport(BaseModel):
    bytes: int
    hugepages: bool
    regions: int


class LoadReport(BaseModel):
    """Of a load job or of the bare ring; the latter has neither kicks nor calls nor a connection."""

    mode: str
    seconds: float
    operations: int
    iops: float
    bytes: int
    errors: int
    latency: Latency
    read: Latency
    write: Latency
    histogram: list[tuple[int, int]]
    queues: list[QueueReport]
    client: ClientReport
    memory: MemoryReport
    kicks: int | None = None
    calls: int | None = None
    connect_ns: int | None = None


class HoldReport(BaseModel):
    """Idle connections: how long each took to be set up."""

    mode: str
    connect_ns: list[int]


class Gap(BaseModel):
    """A time in which nothing completed, or the backend was away; `start_ns` counts from the job's start."""

    start_ns: int
    duration_ns: int


class PatternCounts(BaseModel):
    read: int
    write: int
    flush: int


class PatternReport(BaseModel):
    """Load whose every answer was checked. `errors` to `stuck` count findings, `findings` says the first of
    them; `started_monotonic_ns` is CLOCK_MONOTONIC. The fields are described in docs/benchmarks.md."""

    mode: str
    passed: bool
    seconds: float
    started_monotonic_ns: int
    operations: PatternCounts
    iops: float
    errors: int
    lost: int
    wrong: int
    torn: int
    doubled: int
    stuck: int
    findings: list[str]
    reads_checked: int
    mixed: int
    blocks_written: int
    blocks_checked: int
    inflight_region: bool
    reconnects: int
    outages: list[Gap]
    missed_calls: int
    latency: Latency
    longest_gap_ns: int
    queue_gaps_ns: list[int]
    queue_latency: list[Latency]
    gaps: list[Gap]
    throughput_windows: list[int] | None = None
    cpu_seconds: float
