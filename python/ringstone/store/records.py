"""The rows of the store, as plain values. Sizes are bytes, times CLOCK_REALTIME nanoseconds."""

from dataclasses import dataclass, field
from enum import StrEnum

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]


class VolumeState(StrEnum):
    """How far a volume's life has got. A row in `creating` or `deleting` at start was interrupted and is
    cleaned up."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """`capacity`: the most that the volumes' sizes may add up to; None is no limit."""

    name: str
    type: str
    path: str | None
    capacity: int | None
    created_ns: int
    options: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """`id` is a UUID in its usual form with dashes."""

    name: str
    id: str
    pool: str
    size: int
    block_size: int
    state: VolumeState
    created_ns: int

    @property
    def serial(self) -> str:
        """What the guest reads by GET_ID: virtio-blk gives it 20 bytes (VIRTIO 1.2, 5.2.6)."""
        return self.id.replace("-", "")[:20]


@dataclass(frozen=True, slots=True)
class AttachmentRecord:
    """A volume served at `socket`; one per volume."""

    volume: str
    socket: str
    queues: int
    read_only: bool
    created_ns: int
