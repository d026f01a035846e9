"""What crosses the control API, checked on both sides. Sizes are bytes, times are UTC.

Inside the gateway the same nouns are the plain records of ringstone.state.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_QUEUES = 64
# The largest multiple of 4096 in a signed 64-bit offset, which is what files and the state database count in.
MAX_SIZE = (1 << 63) - 4096

Size = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Answer(BaseModel):
    # A newer gateway may say more than this client knows.
    model_config = ConfigDict(extra="ignore", frozen=True)


class ErrorBody(_Answer):
    """Every answer that is not a success. `code` is a stable word, `message` a sentence with the next
    step."""

    code: str
    message: str


class Faults(_Request):
    """How a faulty pool (tests only) misbehaves: chances per million requests, decided by `seed`."""

    inner: Literal["memory", "file"] = "memory"
    seed: int = Field(default=0, ge=0)
    error_per_million: int = Field(default=0, ge=0, le=1_000_000)
    delay_us: int = Field(default=0, ge=0)
    torn_per_million: int = Field(default=0, ge=0, le=1_000_000)
    lost_per_million: int = Field(default=0, ge=0, le=1_000_000)


class RbdOptions(_Request):
    """Where an rbd pool is. `ceph_pool`: the default is the pool's own name. `conf`: the cluster's ceph.conf, by
    default /etc/ceph/ceph.conf; paths are those of every host. `user`: by default client.admin. `order`: log2 of
    the objects' size. `data_pool`: a pool for the data, such as an erasure-coded one."""

    ceph_pool: str | None = None
    namespace: str | None = None
    conf: str | None = None
    user: str | None = None
    keyring: str | None = None
    order: int | None = Field(default=None, ge=12, le=25)
    data_pool: str | None = None


class KeyOptions(_Request):
    """Where the key of a store pool is, with which it has encrypted volumes: one of these. `key_file`: an absolute
    path on the pool's host; `key_command`: the name of a program in /etc/ringstone/key-commands there, which prints the
    key; `key_credential`: the name of a credential that systemd gives the gateway. The key is 32 bytes, or their 64
    hexadecimal digits."""

    key_file: str | None = None
    key_command: str | None = None
    key_credential: str | None = None


class StoreOptions(KeyOptions):
    """How a store pool is made. `size`: bytes of its file, where that is not there yet. `extent`: bytes of the unit in
    which blocks have a place, a power of two from 16 KiB to 1 MiB, by default 64 KiB. `overcommit`: how many times the
    capacity the volumes' sizes may add up to, by default 10."""

    size: Size | None = None
    extent: int | None = Field(default=None, strict=True)
    overcommit: float | None = None


class PoolCreate(_Request):
    """`path`: a directory, for a file pool also a block device, for a store pool a block device or file; without it the
    gateway chooses.
    `capacity`: the most that the volumes' sizes may add up to. `hugepages`: a memory pool on hugetlbfs.
    `direct`: whether a file pool bypasses the page cache. `host`: where it is to be; a gateway takes only its own
    name. `erase`: a block device that holds something may be taken, and loses it: for a store pool at once, else when a
    volume is made."""

    name: str
    type: str
    host: str | None = None
    path: str | None = None
    capacity: Size | None = None
    hugepages: bool = False
    direct: Literal["auto", "on", "off"] = "auto"
    faults: Faults | None = None
    rbd: RbdOptions | None = None
    store: StoreOptions | None = None
    erase: bool = False


class PoolRekey(KeyOptions):
    """Where the pool's key is from now on."""


class PoolGrow(_Request):
    """`size`: of a store pool's file from now on; a device has its own."""

    size: Size | None = None


class ScrubStart(_Request):
    """`rate`: bytes a second. 64 MiB are little for any drive, and go through a TiB in under five hours."""

    rate: Size = 64 << 20


class Space(_Answer):
    """Of a store pool's drive. `size`: of all of it; `capacity`: of it, for volumes' blocks; `used` and `free` are of
    that; `promised`: the volumes' sizes added up, which may be `promised_at_most`; `reclaiming`: what deleted volumes
    and snapshots still use and is being freed."""

    size: int
    capacity: int
    used: int
    free: int
    promised: int
    promised_at_most: int
    reclaiming: int


class Scrub(_Answer):
    """Of a store pool: the scrub that runs, or the last one since the gateway has the store open. `state` is stopped
    where the store was closed or failed. `total` and `done`: bytes of extents in use; `rate`: bytes a second; `blocks`:
    of 4096 bytes, read, and of these `verified` against their checksums. `bad`: blocks that are not what was written;
    `unreadable`: blocks that the drive refuses; `mended`: faults in what the store says of itself, written anew.
    `faults`: the first hundred of all these, as sentences."""

    state: Literal["running", "done", "cancelled", "stopped"]
    started_at: datetime
    ended_at: datetime | None
    rate: int
    total: int
    done: int
    blocks: int
    verified: int
    bad: int
    unreadable: int
    mended: int
    faults: list[str]


class Pool(_Answer):
    """`host`: the only one that reaches it. `state` is ready, or failed with a `reason`. `provisioned`: the volumes'
    sizes added up; `total` and `free` are those of the medium, None where there is no limit or it is not there.
    `space`, `key` (where its key is) and `scrub` are of store pools; no `scrub`: there was none."""

    name: str
    type: str
    host: str | None = None
    path: str | None
    capacity: int | None
    state: Literal["ready", "failed"]
    reason: str | None
    total: int | None
    free: int | None
    space: Space | None = None
    key: str | None = None
    scrub: Scrub | None = None
    provisioned: int
    volumes: int
    created_at: datetime


class VolumeCreate(_Request):
    """`size` may be left out only where the pool is one block device: then it is the device's. `integrity`: each block
    has a checksum, `encryption`: each is encrypted, both in a store pool."""

    name: str
    pool: str
    size: Size | None = None
    block_size: int = 512
    integrity: bool = False
    encryption: bool = False


class VolumeResize(_Request):
    size: Size


class SnapshotCreate(_Request):
    """`also`: further volumes of the same store pool, which get a snapshot of that name at the same point."""

    name: str
    also: list[str] = []


class SnapshotClone(_Request):
    """`name`: the new volume's."""

    name: str


class VolumeClone(_Request):
    """`name`: the new volume's."""

    name: str


class AttachmentCreate(_Request):
    """`socket`: an absolute path; the default is <run dir>/vhost/<volume>.sock. `queues`: the most that the
    frontend may use; the default is one per reactor, at most 4. `ha`: another host may take the volume over when this
    one is dead. `take_over`: also from a host that has it attached, which is shut out first. `failover_epoch`: only
    while that is the volume's epoch and its owner's host is dead. `incoming`: only listen, for a guest that is to move
    here from another host; `take_over` serves it after that. `host`: where; a gateway takes only its own name.
    `socket_owner`, `socket_group`, `socket_mode`: who may connect to the socket, names or numbers of the host and octal
    digits; by default what its gateway's configuration says."""

    volume: str
    socket: str | None = None
    queues: int | None = Field(default=None, ge=1, le=MAX_QUEUES)
    read_only: bool = False
    ha: bool = False
    take_over: bool = False
    failover_epoch: int | None = Field(default=None, ge=1)
    incoming: bool = False
    host: str | None = None
    socket_owner: str | None = None
    socket_group: str | None = None
    socket_mode: str | None = None


class Sharing(_Request):
    """Whether a second frontend may connect to the volume's socket, for a live migration. Only one may have running
    queues."""

    shared: bool


class Queue(_Answer):
    """`entries` is 0 until the frontend sets the ring up; `reactor` counts the gateway's cores, None while
    stopped."""

    index: int
    entries: int
    reactor: int | None
    running: bool


class Attachment(_Answer):
    """`state`: listening (no frontend), connected (negotiating), running, needs_reset (stopped after a
    malformed ring: the guest must reset the device), failed (not served; `reason` says why), elsewhere (another
    host's), incoming (another host's, whose guest is to move here) or, told by a manager, unreachable (its host does
    not answer). `shared`: a second frontend may connect, for a migration; `frontends` are connected. `socket_owner`,
    `socket_group` and `socket_mode` are what was asked for; `socket_rights` is what came of it with its gateway's
    configuration, such as "libvirt-qemu:kvm 0660"."""

    volume: str
    host: str = "localhost"
    epoch: int = 0
    ha: bool = False
    socket: str
    socket_owner: str | None = None
    socket_group: str | None = None
    socket_mode: str | None = None
    socket_rights: str | None = None
    queues: int
    read_only: bool
    state: str
    reason: str | None = None
    peer_pid: int | None = None
    features: int = 0
    protocol_features: int = 0
    memory_bytes: int = 0
    memory_regions: int = 0
    packed: bool = False
    shared: bool = False
    frontends: int = 0
    queue_states: list[Queue] = []
    created_at: datetime


class Volume(_Answer):
    """`state`: ready, failed (its backing is missing or damaged; `reason` says what), creating or deleting.
    `allocated`: bytes it takes of the medium, None when unknown; `shared`: bytes beside these that it reads from
    snapshots, its own and its parents', in a store pool. `integrity`: its blocks have checksums, `encryption`: they
    are encrypted; None where that is not known. `detail`: how the engine serves it, while attached."""

    name: str
    id: str
    serial: str
    pool: str
    size: int
    block_size: int
    state: str
    reason: str | None
    allocated: int | None
    shared: int | None = None
    integrity: bool | None = None
    encryption: bool | None = None
    detail: str | None
    attachment: Attachment | None
    created_at: datetime


class Snapshot(_Answer):
    """`size`: the volume's when it was made. `own`: bytes of the medium that were written between the snapshot before
    and this one; None when unknown."""

    volume: str
    name: str
    size: int
    own: int | None = None
    created_at: datetime


class Deletion(_Answer):
    """A deleted snapshot that has blocks still. `total`: bytes of the medium that it had; `left`: that it has."""

    volume: str
    snapshot: str
    total: int
    left: int


class Reclaimable(_Answer):
    """`size`: bytes of the medium that deleting the snapshot, alone, would free; None where it has clones."""

    volume: str
    snapshot: str
    size: int | None


class Difference(_Answer):
    """Where the volume's content at snapshot `until` (None: now) may differ from that at `since` (None: from nothing):
    `ranges` of offset and length in bytes, in ascending order. `changed`: their lengths added up."""

    volume: str
    since: str | None
    until: str | None
    changed: int
    ranges: list[tuple[int, int]]


class Event(_Answer):
    """`level` is info, warning or error; `volume` is "" when none is concerned."""

    at: datetime
    level: str
    volume: str
    message: str


class Upgrade(_Answer):
    """A takeover from another process. `stall_ms`: how long guests' requests paused."""

    from_version: str
    to_version: str
    volumes: int
    stall_ms: float
    at: datetime


class Reactor(_Answer):
    """One polling thread, bound to CPU `core`; `index` is how queues name it."""

    index: int
    core: int


class ReactorCreate(_Request):
    core: int = Field(ge=0)


class QueueMove(_Request):
    """`core`: the CPU of the reactor that is to have the queue."""

    core: int = Field(ge=0)


class Host(_Answer):
    """A machine with a gateway. `alive`: it has announced itself within the last seconds. `id` is a UUID that it keeps,
    `addresses` are the URLs of its gateway's API, `reason` is why a living one's gateway is not used or does not
    answer, `seen_at` is of its own clock."""

    name: str
    id: str
    addresses: list[str]
    version: str
    alive: bool
    reason: str | None = None
    cores: list[int]
    free_cores: int
    pools: int
    attachments: int
    seen_at: datetime
    created_at: datetime


class ManagerInfo(_Answer):
    """`failover_grace_s` is None where it takes nothing over by itself."""

    version: str
    pid: int
    started_at: datetime
    url: str
    state: str
    hosts: int
    hosts_alive: int
    pools: int
    volumes: int
    attachments: int
    failover_grace_s: float | None


class GatewayInfo(_Answer):
    """`pools`, `volumes` and `attachments` count what is in the state; None while it is out of reach."""

    version: str
    engine_version: str
    pid: int
    started_at: datetime
    cores: list[int]
    idle_us: int
    state_dir: str
    run_dir: str
    socket: str
    stats_path: str
    pools: int | None
    volumes: int | None
    attachments: int | None
    upgrade: Upgrade | None = None


class Health(_Answer):
    """`status` is ok, or degraded with one sentence per thing that is not as it should be."""

    status: Literal["ok", "degraded"]
    reasons: list[str]
