"""What the gateway asks of a pool. A pool holds no state of its own: the store knows what exists, the disk
what is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ringstone.errors import NoSpaceError
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord
from ringstone.units import format_size


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the medium under the pool; None where there is no limit (null) or it is not there
    (missing)."""

    total: int | None
    free: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`size`: the volume's when it was made, in bytes. `created_s`: seconds since 1970. `own`: bytes of the medium that
    were written between the snapshot before and this one; None when not known."""

    name: str
    size: int
    created_s: int
    own: int | None = None


@dataclass(frozen=True, slots=True)
class Sealed:
    """What is done to a volume's blocks on their way to the drive. `integrity`: each has a checksum; `encryption`: it
    is encrypted."""

    integrity: bool
    encryption: bool


UNSEALED = Sealed(integrity=False, encryption=False)


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where a pool's key is. `kind`: one of ringstone.pools.keys.KINDS; `place`: an absolute path, or the name of a
    command or credential."""

    kind: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind.removeprefix('key_')} {self.place}"


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of a drive that volumes share. `size`: of the drive; `capacity`: of it, for volumes' blocks; `used`: of
    that, what holds something; `promised`: the volumes' sizes added up; `promised_at_most`: the most that those may be;
    `reclaiming`: what deleted volumes and snapshots still use and is being freed."""

    size: int
    capacity: int
    used: int
    promised: int
    promised_at_most: int
    reclaiming: int

    @property
    def free(self) -> int:
        return self.capacity - self.used


@dataclass(frozen=True, slots=True)
class Scrub:
    """Reading all that is in use of a drive. `state`: running, done, cancelled, or stopped with the store. `rate`:
    bytes a second. `total` and `done`: bytes of extents. `blocks`: of 4096 bytes, read, and of these `verified` against
    their checksums. `bad`: not what was written; `unreadable`: refused by the drive; `mended`: of what the store says
    of itself, written anew; `faults`: the first of all these, as sentences. Times are seconds since 1970."""

    state: str
    started_s: int
    ended_s: int | None
    rate: int
    total: int
    done: int
    blocks: int
    verified: int
    bad: int
    unreadable: int
    mended: int
    faults: tuple[str, ...]


class Pool(Protocol):
    """Methods block on the medium and raise errors of ringstone.errors only."""

    record: PoolRecord

    def prepare(self, *, erase: bool = False) -> None:
        """When the pool is made: check its path, and make its directory where it is ours to make. `erase`: a device
        that holds something may be taken; without it ExistsError. `record` may say more of the pool afterwards."""
        ...

    def discard(self) -> None:
        """When the pool is deleted: remove what prepare() made, unless something foreign lies in it."""
        ...

    def identity(self) -> str | None:
        """Names the medium, so that two pools never share one; None for media that cannot be shared by
        mistake."""
        ...

    def check(self) -> None:
        """Raise when the pool's medium is not there now."""
        ...

    def usage(self) -> Usage: ...

    def default_size(self) -> int | None:
        """The size of a volume made without one; None when there is no natural one."""
        ...

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        """Raise NoSpaceError or BusyError unless `extra` bytes fit beside `volumes`, all that the pool has:
        for a `new` volume, or for the growth of one of them."""
        ...

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        """ExistsError when something that is not ours lies where the backing of a new volume would."""
        ...

    def create_backing(self, volume: VolumeRecord) -> None:
        """Make the volume's backing, zeroed. ExistsError when one is there. A failure leaves nothing
        behind."""
        ...

    def remove_backing(self, volume: VolumeRecord) -> None:
        """Remove the backing; one that is not there is no error. After a BusyError all of it is still there."""
        ...

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        """Grow the backing to `size` bytes, or cut back what an undone growth added."""
        ...

    def check_backing(self, volume: VolumeRecord) -> None:
        """Raise FailedError when the backing is missing or shorter than the volume."""
        ...

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        """At the gateway's start: as check_backing(), but a pool whose content does not outlive the host makes the
        backing anew when the host has booted since (`new_boot`), and returns a sentence that says what was lost."""
        ...

    def allocated(self, volume: VolumeRecord) -> int | None:
        """Bytes that the backing takes of the medium; None when not known."""
        ...

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        """The engine's description of the backing (ringstone._engine.Engine.open_volume)."""
        ...


@runtime_checkable
class SharedPool(Protocol):
    """What a pool offers beside, if several hosts reach it: a volume of it has one owner at a time, and whoever was it
    before is shut out by the storage itself."""

    def client(self) -> str:
        """What the storage calls this process."""
        ...

    def retire(self, client: str) -> None:
        """Open nothing more over `client`, a connection that the storage has shut out. What is open on it stays."""
        ...

    def owners(self, volume: VolumeRecord) -> tuple[str, ...]:
        """The clients that may write the volume now."""
        ...

    def incoming_backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        """As backend(), of a volume that another host owns still: it is written by nobody here until it is owned."""
        ...

    def owned_backend(
        self, volume: VolumeRecord, *, epoch: int, predecessors: Sequence[str]
    ) -> dict[str, JsonValue]:
        """As backend(), for the owner: opening it shuts every predecessor out, and fails with FencedError when the
        storage has seen a later epoch."""
        ...


@runtime_checkable
class SnapshotPool(Protocol):
    """What a pool offers beside, if its medium has snapshots. A snapshot holds every write that was acknowledged
    before it; the volume may be attached but for revert()."""

    def snapshots(self, volume: VolumeRecord) -> list[Snapshot]:
        """Oldest first."""
        ...

    def create_snapshot(self, volume: VolumeRecord, name: str) -> None:
        """ExistsError when the name is taken."""
        ...

    def remove_snapshot(self, volume: VolumeRecord, name: str) -> None:
        """BusyError when it has clones, unless the medium keeps what they need (rbd does); NotFoundError when there is
        none."""
        ...

    def revert(self, volume: VolumeRecord, name: str) -> None:
        """Give the volume the snapshot's content; what was written since is gone."""
        ...

    def clone_backing(self, parent: VolumeRecord, snapshot: str, volume: VolumeRecord) -> None:
        """Make the backing of `volume` of a snapshot; its blocks are there at once."""
        ...

    def flatten(self, volume: VolumeRecord) -> None:
        """Copy what a clone still reads from its parent, so that it has none. InvalidError when it has none."""
        ...

    def parent(self, volume: VolumeRecord) -> str | None:
        """`volume@snapshot` that a clone still reads from."""
        ...


@dataclass(frozen=True, slots=True)
class Deletion:
    """A deleted snapshot that has blocks still. `total`: bytes of the medium that it had; `left`: that it has."""

    snapshot: str
    total: int
    left: int


@runtime_checkable
class LayerPool(SnapshotPool, Protocol):
    """What a pool offers beside, if its volumes are layers of one store."""

    def create_group_snapshot(self, volumes: Sequence[VolumeRecord], name: str) -> None:
        """Of all of them at one point: what was acknowledged before it is in, what was sent after it is not. All or
        none; ExistsError when the name is taken in one of them."""
        ...

    def create_sealed(self, volume: VolumeRecord, *, integrity: bool, encryption: bool) -> None:
        """As create_backing, of a volume whose blocks have checksums, or are encrypted, or both. InvalidError when the
        pool has no key and needs one."""
        ...

    def sealed(self, volume: VolumeRecord) -> Sealed | None:
        """What is done to its blocks; None when not known."""
        ...

    def key(self, volume: VolumeRecord) -> bytes | None:
        """What an encrypted volume is opened with; None for others. DeniedError, FailedError or InvalidError when the
        pool's key cannot be had."""
        ...

    def rekey(self, source: KeySource) -> PoolRecord:
        """Have the key of `source` wrap the keys of all volumes, instead of the pool's so far. Returns the pool's
        record from then on. It may be done again after it was interrupted."""
        ...

    def deletions(self, volume: VolumeRecord) -> list[Deletion]:
        """Deleted snapshots that have blocks still."""
        ...

    def keep_snapshot(self, volume: VolumeRecord, name: str) -> None:
        """Take back a snapshot's deletion. BusyError when it has given up blocks, NotFoundError when none is deleted,
        ExistsError when the name has another."""
        ...

    def reclaimable(self, volume: VolumeRecord) -> dict[str, int | None]:
        """Bytes of the medium that deleting each snapshot, alone, would free; None where it has clones."""
        ...

    def clone_running(self, parent: VolumeRecord, volume: VolumeRecord) -> None:
        """Make the backing of `volume` of what `parent` holds now, which may be attached."""
        ...

    def diff(self, volume: VolumeRecord, since: str | None, until: str | None) -> list[tuple[int, int]]:
        """Where the volume's content at snapshot `until` (None: now) may differ from that at `since` (None: from
        nothing): offset and length in bytes, in ascending order."""
        ...

    def shared(self, volume: VolumeRecord) -> int | None:
        """Bytes of the medium that it reads from snapshots, its own and its parents'; None when not known."""
        ...


@runtime_checkable
class DrivePool(Protocol):
    """What a pool offers beside, if it has a drive of its own that volumes share."""

    def space(self) -> Space: ...

    def grow(self, size: int | None) -> None:
        """Use all of a drive that has become longer; a file is made `size` bytes long before. InvalidError when that
        adds nothing."""
        ...

    def begin_scrub(self, rate: int) -> None:
        """Read all that is in use, in the background, `rate` bytes a second. One that runs goes on at that rate."""
        ...

    def cancel_scrub(self) -> None: ...

    def scrub(self) -> Scrub | None:
        """The one that runs, or the last one since this process has opened the drive."""
        ...


def admit_to_capacity(record: PoolRecord, extra: int, volumes: Sequence[VolumeRecord]) -> None:
    """NoSpaceError unless `extra` bytes more stay within the pool's capacity, if it has one."""
    if record.capacity is None:
        return
    room = record.capacity - sum(volume.size for volume in volumes)
    if extra > room:
        raise NoSpaceError(
            f"Pool {record.name!r} has {format_size(max(room, 0))} left of {format_size(record.capacity)}, "
            "and "
            f"{format_size(extra)} more were asked for. Choose a smaller size, delete a volume or use "
            "another pool."
        )
