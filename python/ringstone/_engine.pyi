"""The Rust engine (PyO3 extension). Wrapped by ringstone.gateway; users never import it.

Sizes and offsets are bytes, times are nanoseconds unless the name says otherwise. Every method releases the GIL while
it waits; no reactor ever takes it. Errors are EngineError with `.code` (a stable word) and a message that is a
sentence telling the reader what to do next.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

__version__: str

class EngineError(Exception):
    """`code` is one of: exists, not_found, busy, invalid, no_device, no_space, unsupported, io, stopped."""

    code: str

class Event(TypedDict):
    """One line of the engine's log. Levels: "info", "warning", "error". `volume` is "" when none is concerned."""

    at_ns: int  # CLOCK_REALTIME
    level: str
    volume: str
    message: str

class QueueInfo(TypedDict):
    index: int
    size: int  # ring entries; 0 until the frontend sets the queue up
    reactor: int | None  # index into the engine's cores; None while the queue is stopped
    running: bool

class AttachmentInfo(TypedDict):
    """`state`: listening (no frontend), connected (negotiating), running (a queue runs), needs_reset (stopped after
    a malformed ring; the guest driver must reset the device)."""

    volume: str
    socket: str
    state: str
    features: int  # negotiated virtio feature bits, 0 while listening
    protocol_features: int
    memory_bytes: int  # guest memory mapped
    memory_regions: int
    registered_bytes: int  # of it, registered with io_uring as fixed buffers
    peer_pid: int | None
    shared: NotRequired[bool]  # a second frontend may connect
    frontends: NotRequired[int]  # connected now
    queues: list[QueueInfo]

class VolumeInfo(TypedDict):
    name: str
    size: int
    block_size: int
    read_only: bool
    backend: str  # "memory", "file", "null", "faulty"
    detail: str  # e.g. "io_uring, O_DIRECT" or "memory, 2 MiB pages" or "mapped (tmpfs)"
    discard: bool
    attached: bool

class Engine:
    """One engine per process. `cores`: CPU numbers, one reactor thread bound to each. `idle_us`: how long a reactor
    polls without work before it arms notifications and sleeps. `stats_path`: file of the stats page
    (docs/formats/stats-page.md), made anew; a path on tmpfs such as /run is expected."""

    def __init__(self, cores: Sequence[int], *, idle_us: int = 200, stats_path: str) -> None: ...
    def open_volume(
        self,
        name: str,
        backend: str,
        *,
        size: int,
        block_size: int = 512,
        read_only: bool = False,
        serial: str = "",
    ) -> None:
        """`backend` is JSON, one of
        {"type": "memory", "path": null | "/dev/shm/...", "hugepages": "auto" | "on" | "off"}
            path null: anonymous, content gone with the engine; a path on tmpfs or hugetlbfs: content stays in the file
        {"type": "file", "path": "...", "direct": "auto" | "on" | "off"}
            an existing regular file (at least `size` long) or block device; on tmpfs it is mapped instead of io_uring
        {"type": "null"}
            reads leave the buffer as it is, writes are dropped
        {"type": "faulty", "inner": {...}, "seed": 0, "error_per_million": 0, "delay_us": 0, "torn_per_million": 0,
         "lost_per_million": 0}
            tests only: makes `inner` (memory or file) fail, wait, tear or lose writes, decided by the seed
        `name` up to 63 bytes, `serial` up to 20 bytes (what GET_ID answers; default: the name cut to 20).
        """
    def close_volume(self, name: str) -> None:
        """Error busy while attached."""
    def resize_volume(self, name: str, size: int) -> None:
        """Grow (the file must already be long enough). A running guest is told by a config-change message."""
    def volumes(self) -> list[VolumeInfo]: ...
    def attach(self, name: str, socket_path: str, *, queues: int = 1) -> None:
        """Listen on `socket_path` (made anew, mode 0600; a stale socket is replaced, a live one is an error `exists`)
        and serve the volume there to one frontend at a time. `queues` 1..64 is the most the frontend may use."""
    def detach(self, name: str, *, force: bool = False) -> None:
        """Stop listening, drain, close. Error busy while a frontend is connected, unless `force`."""
    def share(self, name: str, shared: bool) -> None:
        """While shared, a second frontend may connect to the volume's socket: the other end of a live migration. Only
        one of them may have running queues. Error busy when `shared` is ended while two are connected."""
    def attachments(self) -> list[AttachmentInfo]: ...
    def watchdog(self, socket: str, interval_ms: int) -> None:
        """Say WATCHDOG=1 to the service manager at `socket` (NOTIFY_SOCKET: a path, or "@name") every `interval_ms`,
        while every polling reactor also turns; one that is stuck becomes an event. Ends with stop(); takes no GIL."""
    def event_fd(self) -> int:
        """An eventfd that is readable while drain_events() has something; owned by the engine."""
    def drain_events(self) -> list[Event]: ...
    def stop(self) -> None:
        """Detach everything, drain and join all threads. Idempotent."""

def load(config: str) -> str:
    """Drive a vhost-user-blk socket (crates/load). JSON in, JSON out; see ringstone.bench."""

def limit(config: str) -> str:
    """The bare shared-memory ring between two cores (crates/load). JSON in, JSON out; see ringstone.bench."""
