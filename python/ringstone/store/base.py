"""The store's interface. Every method may be called from any thread and raises only errors of
ringstone.errors."""

from contextlib import AbstractContextManager
from typing import Protocol

from ringstone.store.records import AttachmentRecord, PoolRecord, VolumeRecord, VolumeState


class Store(Protocol):
    """Each single call is atomic; `transaction()` makes several so. What a call wrote is on stable media when
    the outermost transaction (or the lone call) has returned."""

    def transaction(self) -> AbstractContextManager[None]:
        """All or nothing: an exception out of the block undoes it. Blocks nest; other threads wait meanwhile,
        so nothing slow belongs inside."""
        ...

    def pools(self) -> list[PoolRecord]:
        """By name."""
        ...

    def pool(self, name: str) -> PoolRecord:
        """NotFoundError when there is none."""
        ...

    def add_pool(self, pool: PoolRecord) -> None:
        """ExistsError when the name is taken."""
        ...

    def remove_pool(self, name: str) -> None:
        """BusyError while it has volumes, NotFoundError when there is none."""
        ...

    def volumes(self, pool: str | None = None) -> list[VolumeRecord]:
        """By name; of one pool, or all."""
        ...

    def volume(self, name: str) -> VolumeRecord:
        """NotFoundError when there is none."""
        ...

    def add_volume(self, volume: VolumeRecord) -> None:
        """ExistsError when the name is taken, NotFoundError when its pool is not there."""
        ...

    def set_volume_state(self, name: str, state: VolumeState) -> None: ...

    def set_volume_size(self, name: str, size: int) -> None: ...

    def remove_volume(self, name: str) -> None:
        """BusyError while attached, NotFoundError when there is none."""
        ...

    def attachments(self) -> list[AttachmentRecord]:
        """By volume."""
        ...

    def attachment(self, volume: str) -> AttachmentRecord | None: ...

    def add_attachment(self, attachment: AttachmentRecord) -> None:
        """ExistsError when the volume is attached or another one uses the socket, NotFoundError without the
        volume."""
        ...

    def remove_attachment(self, volume: str) -> None:
        """NotFoundError when it is not attached."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...
