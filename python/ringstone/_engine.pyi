"""The Rust engine (PyO3 extension). Wrapped by ringstone.gateway; users never import it.

Sizes and offsets are bytes, times are nanoseconds unless the name says otherwise. Every method releases the GIL while
it waits; no reactor ever takes it. Errors are EngineError with `.code` (a stable word) and a message that is a
sentence telling the reader what to do next.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

__version__: str

class EngineError(Exception):
    """`code` is one of: exists, not_found, busy, in_use, invalid, no_device, no_space, unsupported, io, gone, stopped,
    fenced, denied, unreachable, failed."""

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
    peer_pid: int | None
    packed: bool  # the rings are packed ones
    shared: bool  # a second frontend may connect
    frontends: int  # connected now
    queues: list[QueueInfo]

class VolumeInfo(TypedDict):
    name: str
    size: int
    block_size: int
    read_only: bool
    backend: str  # "memory", "file", "store", "rbd", "null", "faulty"
    detail: str  # e.g. "io_uring, O_DIRECT" or "memory, 2 MiB pages" or "mapped (tmpfs)"
    discard: bool
    fenced: bool  # another host owns it: it is not served any more
    client: str | None  # what storage across hosts knows this client by
    attached: bool

class Takeover(TypedDict):
    version: str  # of the process before
    volumes: int
    stall_ns: int  # from the first queue told to stop until the last ran here
    extras: dict[str, int]  # descriptors by name

class Handover(TypedDict):
    version: str  # of the process that goes on
    volumes: int
    stall_ns: int
    drain_ns: int  # of it, until all requests in flight were done

class Engine:
    """One engine per process. `cores`: CPU numbers, one reactor thread bound to each. `idle_us`: how long a reactor
    polls without work before it arms notifications and sleeps. `stats_path`: file of the stats page
    (docs/formats/stats-page.md), made anew; a path on tmpfs such as /run is expected."""

    def __init__(
        self, cores: Sequence[int], *, idle_us: int = 200, stats_path: str, balance: bool = True
    ) -> None:
        """`balance`: move queues between reactors by measured load."""
    @staticmethod
    def take_over(
        socket: int,
        cores: Sequence[int],
        *,
        idle_us: int = 200,
        stats_path: str,
        balance: bool = True,
        version: str,
    ) -> tuple[Engine, Takeover]:
        """Go on with what the engine at the other end of the connected Unix socket serves (docs/formats/handover.md).
        Returns when it runs here; an error means that it still runs there. The descriptors in `extras` are the
        caller's to close."""
    def hand_over(
        self, socket: int, *, version: str, extras: Mapping[str, int], drain_ms: int = 10_000
    ) -> Handover:
        """The other side of take_over. After it returns, abandon() the engine. An error means that everything goes
        on here, unless its code is `gone`: the new process was lost after it was told to go. `extras` stay the
        caller's; copies of them arrive."""
    def abandon(self) -> None:
        """End the engine without touching sockets and frontends, which another process has now."""
    def open_volume(
        self,
        name: str,
        backend: str,
        *,
        size: int,
        block_size: int = 512,
        read_only: bool = False,
        serial: str = "",
        key: bytes | None = None,
    ) -> None:
        """`key`: of an encrypted volume, the pool's key that wraps its own; error denied without it and for another.
        `backend` is JSON, one of
        {"type": "memory", "path": null | "/dev/shm/...", "hugepages": "auto" | "on" | "off"}
            path null: anonymous, content gone with the engine; a path on tmpfs or hugetlbfs: content stays in the file
        {"type": "file", "path": "...", "direct": "auto" | "on" | "off"}
            an existing regular file (at least `size` long) or block device; on tmpfs it is mapped instead of io_uring
        {"type": "rbd", "conf": "/etc/ceph/ceph.conf", "user": "client.admin", "keyring": null | "...", "pool": "...",
         "namespace": "", "image": "...", "epoch": 0, "predecessors": ["address", ...]}
            an image of a Ceph cluster, with its exclusive lock unless read_only; every predecessor is on the cluster's
            blocklist when this returns. Error fenced when the image knows a later epoch, busy when another has the lock
        {"type": "store", "path": "...", "volume": "..."}
            a volume of the store at `path`, which is opened unless it is (class Store)
        {"type": "null"}
            reads leave the buffer as it is, writes are dropped
        {"type": "faulty", "inner": {...}, "seed": 0, "error_per_million": 0, "delay_us": 0, "torn_per_million": 0,
         "lost_per_million": 0}
            tests only: makes `inner` (memory or file) fail, wait, tear or lose writes, decided by the seed
        `name` up to 63 bytes, `serial` up to 20 bytes (what GET_ID answers; default: the name cut to 20).
        """
    def close_volume(self, name: str) -> None:
        """Error busy while attached."""
    def own_volume(self, name: str, backend: str) -> None:
        """Of an incoming one; `backend` as for open_volume()."""

    def release_volume(self, name: str) -> None:
        """It is incoming then."""

    def fence_volume(self, name: str) -> None:
        """Stop its I/O at once and for good: another host owns it. Requests in flight are not answered."""
    def resize_volume(self, name: str, size: int) -> None:
        """Grow (the file must already be long enough). A running guest is told by a config-change message."""
    def volumes(self) -> list[VolumeInfo]: ...
    def attach(
        self,
        name: str,
        socket_path: str,
        *,
        queues: int = 1,
        owner: int | None = None,
        group: int | None = None,
        mode: int = 0o600,
    ) -> None:
        """Listen on `socket_path` (made anew; a stale socket is replaced, a live one is an error `exists`) and serve
        the volume there to one frontend at a time. `queues` 1..64 is the most the frontend may use. Nobody can connect
        before the file has `owner`, `group` (ids; None is this process's) and `mode`."""
    def detach(self, name: str, *, force: bool = False) -> None:
        """Stop listening, drain, close. Error busy while a frontend is connected, unless `force`."""
    def attachments(self) -> list[AttachmentInfo]: ...
    def share(self, name: str, shared: bool) -> None:
        """Let a second frontend connect to the same socket; only one of the two runs its queues at a time. Error busy
        when two are connected and `shared` is false."""
    def move_queue(self, name: str, queue: int, core: int) -> None:
        """Begin to move a running queue to the reactor on `core`."""
    def reactors(self) -> list[tuple[int, int]]:
        """(index, core) of the reactors that take queues."""
    def add_reactor(self, core: int) -> int:
        """Start a reactor on `core`; its index."""
    def remove_reactor(self, core: int) -> None:
        """Move every queue off the reactor on `core` and end it. Error busy when it is the last."""
    def watchdog(self, socket: str, interval_ms: int) -> None:
        """Say WATCHDOG=1 to the service manager at `socket` (NOTIFY_SOCKET: a path, or "@name") every `interval_ms`,
        while every polling reactor also turns; one that is stuck becomes an event. Ends with stop(); takes no GIL."""
    def event_fd(self) -> int:
        """An eventfd that is readable while drain_events() has something; owned by the engine."""
    def drain_events(self) -> list[Event]: ...
    def stop(self) -> None:
        """Detach everything, drain and join all threads. Idempotent."""

class ImageInfo(TypedDict):
    size: int
    owners: list[str]  # addresses of the clients that have its exclusive lock
    parent: tuple[str, str, str] | None  # pool, image, snapshot

class SnapshotInfo(TypedDict):
    name: str
    size: int
    created_s: int  # seconds since 1970, as the cluster's clock has it

class RbdImages:
    """The images of a Ceph pool. Connections are shared in the process by (conf, user, keyring), with open volumes too.
    Every method waits for the cluster. An image that is open for writing elsewhere is changed by that client, whom
    librbd asks."""

    def __init__(
        self, *, conf: str, user: str, keyring: str | None = None, pool: str, namespace: str = ""
    ) -> None: ...
    def identity(self) -> str:
        """The cluster's id and the pool's number in it."""
    def client(self) -> str:
        """What the cluster calls this connection; a blocklist names it."""
    def retire(self) -> None:
        """Nobody new shares this connection: the cluster has shut it out."""
    def usage(self) -> tuple[int, int]:
        """Raw bytes of the cluster: total and free."""
    def create(self, image: str, size: int, *, order: int | None = None, data_pool: str = "") -> None: ...
    def remove(self, image: str) -> None:
        """Error no_device when it is not there, busy while it is open somewhere or has snapshots."""
    def resize(self, image: str, size: int) -> None: ...
    def info(self, image: str) -> ImageInfo: ...
    def snapshots(self, image: str) -> list[SnapshotInfo]:
        """Oldest first."""
    def create_snapshot(self, image: str, snapshot: str) -> None: ...
    def remove_snapshot(self, image: str, snapshot: str) -> None: ...
    def revert(self, image: str, snapshot: str) -> None: ...
    def clone_image(
        self, parent: str, snapshot: str, image: str, *, order: int | None = None, data_pool: str = ""
    ) -> None: ...
    def flatten(self, image: str) -> None: ...

class Store:
    """A store that this process has open, once per path however often this is called. Needs a running Engine in the
    process."""

    def __init__(self, path: str) -> None:
        """Opens it, takes its lock. Error in_use, no_device, failed, invalid."""
    @staticmethod
    def format(path: str, *, size: int | None = None, extent: int = 65536) -> str:
        """Makes a store, returns its uuid (hex); a regular file is created and preallocated with `size` bytes if it is
        not there."""
    @staticmethod
    def look(path: str) -> str | None:
        """uuid (hex) of the store there, None if there is none; no lock."""
    @staticmethod
    def check(path: str, *, progress: Callable[[int, int], None] | None = None) -> str:
        """Offline; JSON {"uuid", "size", "extent", "capacity", "used", "volumes": [as in list], "faults": [str],
        "notes": [str], "mendable": [str], "blocks": {"read", "verified", "bad", "unreadable"} | null}. With `progress`
        the blocks in use are read too; it hears of the bytes read and of all, and what it raises ends the check."""
    @staticmethod
    def repair(path: str) -> str:
        """Offline; writes anew what check() calls mendable; JSON as check(). Error io when there are faults that it
        cannot mend; nothing is written then."""
    def call(self, command: str) -> str:
        """JSON in, JSON out; blocks. Commands:
        {"op": "create", "name", "size", "integrity": false}, {"op": "delete", "name"}, {"op": "resize", "name", "size"}
        {"op": "snapshot", "volumes": [..], "name"}: of all of them at one point
        {"op": "delete_snapshot", "volume", "name"}, {"op": "revert", "volume", "name"}
        {"op": "keep_snapshot", "volume", "name"}: of one that is being deleted; error busy when blocks of it are free
        {"op": "reclaimable", "volume"} -> {"snapshots": [[name, bytes | null], ..]}: null has clones
        {"op": "clone", "volume", "snapshot" | null, "name"}
        {"op": "flatten", "volume"}: answers when done
        {"op": "list"} -> {"volumes": [{"name", "size", "created_s", "own", "inherited", "origin": [volume, snapshot] |
            null, "open", "integrity", "encryption", "snapshots": [{"name", "size", "created_s", "own"}],
            "deleting": [{"name", "total", "left"}]}]}
        {"op": "figures"} -> {"size", "capacity", "used", "promised", "reclaiming"}
        {"op": "diff", "volume", "from" | null, "to" | null} -> {"ranges": [[offset, length], ..]}
        {"op": "grow"}: takes the drive's present length
        {"op": "scrub", "rate"}: begins to read all that is in use, bytes a second; one that runs gets that rate
        {"op": "cancel_scrub"}, {"op": "scrub_status"}; all three answer {"scrub": null | {"started_s", "rate", "total",
            "done", "blocks", "verified", "bad", "unreadable", "mended", "faults": [str], "state": "running" | "done" |
            "cancelled" | "stopped", "ended_s" | null}}
        Others answer {}. Error not_found, exists, busy, in_use, no_space, invalid, failed."""
    def create_encrypted(self, name: str, size: int, integrity: bool, key: bytes) -> None:
        """A volume with a new key of its own, which `key`, the pool's, wraps. Errors as of call()."""
    def wrap_anew(self, before: Sequence[bytes], key: bytes) -> int:
        """Have `key` wrap the keys of all volumes that it has not wrapped; each must be wrapped by one of `before`,
        else error denied and nothing is changed. How many these were."""
    def close(self) -> None:
        """Writes a checkpoint and lets go. Error busy while a volume of it is open."""

def map_without_data(path: str, volume: str, size: int) -> None:
    """For measurements: writes a volume of the store at `path`, which nobody has open, from its begin to `size`, as a
    guest would, but leaves the guest's data out. Error in_use, no_device, failed, invalid, not_found."""

def load(config: str) -> str:
    """Drive a vhost-user-blk socket (crates/load). JSON in, JSON out; see ringstone.bench."""

def limit(config: str) -> str:
    """The bare shared-memory ring between two cores (crates/load). JSON in, JSON out; see ringstone.bench."""
