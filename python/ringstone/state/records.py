"""The records of the store, as plain values. Sizes are bytes, times CLOCK_REALTIME nanoseconds."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

LOCAL_HOST = "localhost"
"""The name of the only host there is, where the state is kept in SQLite and nobody gave it another."""


class VolumeState(StrEnum):
    """How far a volume's life has got. A record in `creating` or `deleting` at start was interrupted and is
    cleaned up."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


# After a host's last word, when it counts as dead. Three words fit into it.
LEASE_SECONDS = 15


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A machine with a gateway. `id` is a UUID that the machine keeps; `version` is its gateway's; `cores` are those
    of its reactors, and `free_cores` how many more it could give; `seen_ns` is its own clock at its latest
    announcement. Whether it is alive is told by a lease, never by that clock."""

    name: str
    id: str
    addresses: tuple[str, ...]
    version: str
    cores: tuple[int, ...]
    free_cores: int
    seen_ns: int
    created_ns: int


@dataclass(frozen=True, slots=True)
class AliveRecord:
    """A host whose lease has not run out. `id` is the host's."""

    host: str
    id: str


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """`capacity`: the most that the volumes' sizes may add up to; None is no limit. `host`: the only one that reaches
    the pool; None when every host does."""

    name: str
    type: str
    path: str | None
    capacity: int | None
    created_ns: int
    options: dict[str, JsonValue] = field(default_factory=dict)
    host: str | None = None


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """`id` is a UUID in its usual form with dashes. `epoch` counts the volume's owners: 0 while it has had none, one
    more with every change of owner, never less."""

    name: str
    id: str
    pool: str
    size: int
    block_size: int
    state: VolumeState
    created_ns: int
    epoch: int = 0

    @property
    def serial(self) -> str:
        """What the guest reads by GET_ID: virtio-blk gives it 20 bytes (VIRTIO 1.2, 5.2.6)."""
        return self.id.replace("-", "")[:20]


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """A volume served at `socket` of `host`, its owner since `epoch`; one per volume. `ha`: another host may take it
    over by itself when this one is dead. `client`: what a successor must fence in the storage, in the pool type's own
    words; empty until the volume has been opened, and where nothing can be fenced. `socket_owner`, `socket_group` and
    `socket_mode` (octal digits): who may connect; None is what the host's gateway has for all."""

    volume: str
    socket: str
    queues: int
    read_only: bool
    created_ns: int
    host: str = LOCAL_HOST
    epoch: int = 0
    ha: bool = False
    client: dict[str, JsonValue] = field(default_factory=dict)
    socket_owner: str | None = None
    socket_group: str | None = None
    socket_mode: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A volume got an owner. `previous` is the attachment that was replaced: its client is to be fenced before the
    new owner serves."""

    attachment: AttachmentRecord
    previous: AttachmentRecord | None


R = TypeVar("R", HostRecord, AliveRecord, PoolRecord, VolumeRecord, AttachmentRecord)


@dataclass(frozen=True, slots=True)
class Kind(Generic[R]):
    """A collection of records: its name in keys, tables and exports, and the field that tells one from another."""

    name: str
    record: type[R]
    key: str

    def key_of(self, record: R) -> str:
        return str(getattr(record, self.key))


HOSTS = Kind("hosts", HostRecord, "name")
ALIVE = Kind("alive", AliveRecord, "host")
POOLS = Kind("pools", PoolRecord, "name")
VOLUMES = Kind("volumes", VolumeRecord, "name")
ATTACHMENTS = Kind("attachments", AttachmentRecord, "volume")


@dataclass(frozen=True, slots=True)
class Change(Generic[R]):
    """What became of the record `key`; None: it is gone."""

    key: str
    record: R | None


def differences(before: dict[str, R], after: dict[str, R]) -> list[Change[R]]:
    """What leads from one state of a collection, by key, to another."""
    gone: list[Change[R]] = [Change(key, None) for key in before if key not in after]
    return gone + [Change(key, record) for key, record in after.items() if before.get(key) != record]
