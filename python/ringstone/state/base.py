"""The store's interface. Every method may be called from any thread and raises only errors of
ringstone.errors."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

from ringstone.state.records import (
    AttachmentRecord,
    Change,
    Claim,
    HostRecord,
    JsonValue,
    Kind,
    PoolRecord,
    R,
    VolumeRecord,
    VolumeState,
)

T = TypeVar("T")
C = TypeVar("C", covariant=True)


class Watch(Protocol[C]):
    """An endless iterator; use it from one thread."""

    def __iter__(self) -> Iterator[C]: ...

    def close(self) -> None:
        """End the iteration, from any thread. Idempotent."""
        ...


class Store(Protocol):
    """Each single call is atomic; `transact()` makes several so. What a call wrote is on stable media (with etcd: on a
    majority of its members) when the outermost transaction, or the lone call, has returned.

    With etcd every method may also raise UnreachableError. A change that fails with it says whether it may yet have
    been made."""

    def transact(self, step: Callable[[], T]) -> T:
        """Run `step`, whose calls of this store take effect all at once or, when it raises, not at all. It reads one
        state of the store and what it wrote itself. It may be run several times, as others may change what it
        read, so it has no effect but on the store, and does nothing slow. BusyError when others were always first. A
        transaction in a transaction is part of it."""
        ...

    # hosts

    def announce(self, host: HostRecord, ttl_s: int) -> None:
        """Keep the host's record, and let it be alive for `ttl_s` seconds from now; to be repeated meanwhile.
        ExistsError when another machine has its name, or it is known by another name. `created_ns` of a host that is
        known stays."""
        ...

    def hosts(self) -> list[HostRecord]:
        """By name."""
        ...

    def host_alive(self, name: str) -> bool:
        """Whether its lease has not run out. In SQLite the lone host always is, once it was announced."""
        ...

    def alive_hosts(self) -> set[str]: ...

    def remove_host(self, name: str) -> None:
        """BusyError while it is alive, has pools or attachments; NotFoundError when there is none."""
        ...

    # pools

    def pools(self) -> list[PoolRecord]:
        """By name."""
        ...

    def pool(self, name: str) -> PoolRecord:
        """NotFoundError when there is none."""
        ...

    def add_pool(self, pool: PoolRecord) -> None:
        """ExistsError when the name is taken."""
        ...

    def set_pool_options(self, name: str, options: Mapping[str, JsonValue]) -> None:
        """NotFoundError when there is none."""
        ...

    def remove_pool(self, name: str) -> None:
        """BusyError while it has volumes, NotFoundError when there is none."""
        ...

    # volumes

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

    # attachments

    def attachments(self) -> list[AttachmentRecord]:
        """By volume."""
        ...

    def attachment(self, volume: str) -> AttachmentRecord | None: ...

    def claim(self, attachment: AttachmentRecord, *, take_over: bool = False) -> Claim:
        """Make `attachment.host` the volume's owner: raise the volume's epoch by one and write the attachment with it,
        in place of one that is there only to `take_over`. ExistsError when the volume is attached, or another one
        uses the socket on that host; NotFoundError without the volume."""
        ...

    def set_attachment(self, attachment: AttachmentRecord) -> None:
        """Change an attachment of the same owner: FencedError when its host or epoch is no longer that of
        `attachment`, ExistsError when another volume uses the socket."""
        ...

    def set_attachment_client(
        self, volume: str, epoch: int, client: dict[str, JsonValue]
    ) -> AttachmentRecord:
        """Say what a successor must fence. FencedError when the volume has a later epoch already."""
        ...

    def remove_attachment(self, volume: str, epoch: int | None = None) -> None:
        """NotFoundError when it is not attached; FencedError when it is in an epoch other than the one given."""
        ...

    # changes

    def watch(self, kind: Kind[R]) -> Watch[Change[R]]:
        """All records of a kind as they are, each as a Change, and then whatever changes. Records that change quickly
        are told in their latest state, perhaps not in those between. A watch never fails: with etcd out of reach it
        says nothing until that is back. SQLite tells of changes by this process."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...
