"""What may be done to the records, whatever keeps them: the one place for names that are taken, things in use, and
owners that have lost their epoch. A store adds to it how records are kept (`_get` and its like) and what makes several
of these calls one (`transact`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ringstone.errors import BusyError, ExistsError, FencedError, NotFoundError
from ringstone.state.records import (
    ALIVE,
    ATTACHMENTS,
    HOSTS,
    POOLS,
    VOLUMES,
    AttachmentRecord,
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


class Rules(ABC):
    """All of ringstone.state.Store but what depends on where records are kept."""

    @abstractmethod
    def transact(self, step: Callable[[], T]) -> T: ...

    @abstractmethod
    def _get(self, kind: Kind[R], key: str) -> R | None: ...

    @abstractmethod
    def _list(self, kind: Kind[R]) -> list[R]:
        """By key."""

    @abstractmethod
    def _put(self, kind: Kind[R], record: R) -> None:
        """Add it, or replace the one with its key. Only inside transact()."""

    @abstractmethod
    def _delete(self, kind: Kind[R], key: str) -> None:
        """One that is there. Only inside transact()."""

    @abstractmethod
    def _at_socket(self, host: str, socket: str) -> str | None:
        """The volume that is attached there."""

    # hosts

    def hosts(self) -> list[HostRecord]:
        return self._list(HOSTS)

    def host_alive(self, name: str) -> bool:
        return self._get(ALIVE, name) is not None

    def alive_hosts(self) -> set[str]:
        return {record.host for record in self._list(ALIVE)}

    def _keep_host(self, host: HostRecord) -> None:
        """Inside transact()."""
        known = self._get(HOSTS, host.name)
        if known is None:
            # Only then: heartbeats of many hosts must not be in each other's way.
            self._refuse_second_name(host)
        elif known.id != host.id:
            raise ExistsError(self._of_two_hosts(host))
        self._put(HOSTS, replace(host, created_ns=known.created_ns) if known else host)

    def _of_two_hosts(self, host: HostRecord) -> str:
        if self._get(ALIVE, host.name) is not None:
            return (
                f"Another machine runs as host {host.name!r} now. Give this one another name, with `host` in its "
                "gateway's configuration."
            )
        return (
            f"Host {host.name!r} is known as another machine, which is not running now. Give this one another name, "
            "with `host` in its gateway's configuration; or, when it has replaced that machine for good, remove the "
            "host first."
        )

    def _refuse_second_name(self, host: HostRecord) -> None:
        for other in self._list(HOSTS):
            if other.id == host.id:
                raise ExistsError(
                    f"This machine is known as host {other.name!r}, not {host.name!r}. Give it that name again, with "
                    "`host` in its gateway's configuration, or remove that host first. If it is a clone of that "
                    "machine, remove the file host-id in its state directory."
                )

    def remove_host(self, name: str) -> None:
        self.transact(partial(self._remove_host, name))

    def _remove_host(self, name: str) -> None:
        if self._get(HOSTS, name) is None:
            raise NotFoundError(f"There is no host {name!r}.")
        if self._get(ALIVE, name) is not None:
            raise BusyError(f"Host {name!r} is alive; stop its gateway first.")
        pools = [pool.name for pool in self._list(POOLS) if pool.host == name]
        if pools:
            raise BusyError(f"Pool {pools[0]!r} is on host {name!r}; delete the host's pools first.")
        attached = [one.volume for one in self._list(ATTACHMENTS) if one.host == name]
        if attached:
            raise BusyError(
                f"Volume {attached[0]!r} is attached on host {name!r}; attach the host's volumes elsewhere first."
            )
        self._delete(HOSTS, name)

    # pools

    def pools(self) -> list[PoolRecord]:
        return self._list(POOLS)

    def pool(self, name: str) -> PoolRecord:
        pool = self._get(POOLS, name)
        if pool is None:
            raise NotFoundError(f"There is no pool {name!r}; `ringstone pool list` shows those there are.")
        return pool

    def add_pool(self, pool: PoolRecord) -> None:
        self.transact(partial(self._add_pool, pool))

    def _add_pool(self, pool: PoolRecord) -> None:
        if self._get(POOLS, pool.name) is not None:
            raise ExistsError(f"A pool {pool.name!r} exists already; choose another name.")
        self._put(POOLS, pool)

    def set_pool_options(self, name: str, options: Mapping[str, JsonValue]) -> None:
        def change() -> None:
            self._put(POOLS, replace(self.pool(name), options=dict(options)))

        self.transact(change)

    def remove_pool(self, name: str) -> None:
        self.transact(partial(self._remove_pool, name))

    def _remove_pool(self, name: str) -> None:
        self.pool(name)
        if self.volumes(name):
            raise BusyError(f"Pool {name!r} still has volumes; delete them first.")
        self._delete(POOLS, name)

    # volumes

    def volumes(self, pool: str | None = None) -> list[VolumeRecord]:
        return [volume for volume in self._list(VOLUMES) if pool is None or volume.pool == pool]

    def volume(self, name: str) -> VolumeRecord:
        volume = self._get(VOLUMES, name)
        if volume is None:
            raise NotFoundError(
                f"There is no volume {name!r}; `ringstone volume list` shows those there are."
            )
        return volume

    def add_volume(self, volume: VolumeRecord) -> None:
        self.transact(partial(self._add_volume, volume))

    def _add_volume(self, volume: VolumeRecord) -> None:
        self.pool(volume.pool)
        if self._get(VOLUMES, volume.name) is not None:
            raise ExistsError(f"A volume {volume.name!r} exists already; choose another name.")
        self._put(VOLUMES, volume)

    def set_volume_state(self, name: str, state: VolumeState) -> None:
        self.transact(lambda: self._put(VOLUMES, replace(self.volume(name), state=state)))

    def set_volume_size(self, name: str, size: int) -> None:
        self.transact(lambda: self._put(VOLUMES, replace(self.volume(name), size=size)))

    def remove_volume(self, name: str) -> None:
        self.transact(partial(self._remove_volume, name))

    def _remove_volume(self, name: str) -> None:
        self.volume(name)
        if self.attachment(name) is not None:
            raise BusyError(f"Volume {name!r} is attached; run `ringstone volume detach {name}` first.")
        self._delete(VOLUMES, name)

    # attachments

    def attachments(self) -> list[AttachmentRecord]:
        return self._list(ATTACHMENTS)

    def attachment(self, volume: str) -> AttachmentRecord | None:
        return self._get(ATTACHMENTS, volume)

    def claim(self, attachment: AttachmentRecord, *, take_over: bool = False) -> Claim:
        return self.transact(partial(self._claim, attachment, take_over))

    def _claim(self, attachment: AttachmentRecord, take_over: bool) -> Claim:
        volume = self.volume(attachment.volume)
        held = self.attachment(volume.name)
        if held is not None and not take_over:
            raise ExistsError(_held(held, attachment.host))
        raised = replace(volume, epoch=volume.epoch + 1)
        claimed = replace(attachment, epoch=raised.epoch)
        self._refuse_taken_socket(claimed)
        self._put(VOLUMES, raised)
        self._put(ATTACHMENTS, claimed)
        return Claim(claimed, held)

    def _refuse_taken_socket(self, attachment: AttachmentRecord) -> None:
        if self._at_socket(attachment.host, attachment.socket) not in (None, attachment.volume):
            raise ExistsError(f"Another volume is attached at {attachment.socket}; choose another socket.")

    def set_attachment(self, attachment: AttachmentRecord) -> None:
        self.transact(partial(self._set_attachment, attachment))

    def _set_attachment(self, attachment: AttachmentRecord) -> None:
        held = self._owned(attachment.volume, attachment.epoch)
        if held.host != attachment.host:
            raise FencedError(_lost(attachment.volume, attachment.epoch, held))
        self._refuse_taken_socket(attachment)
        self._put(ATTACHMENTS, attachment)

    def set_attachment_client(
        self, volume: str, epoch: int, client: dict[str, JsonValue]
    ) -> AttachmentRecord:
        return self.transact(partial(self._set_attachment_client, volume, epoch, client))

    def _set_attachment_client(
        self, volume: str, epoch: int, client: dict[str, JsonValue]
    ) -> AttachmentRecord:
        changed = replace(self._owned(volume, epoch), client=client)
        self._put(ATTACHMENTS, changed)
        return changed

    def _owned(self, name: str, epoch: int) -> AttachmentRecord:
        """The volume's attachment, if it is that of `epoch`."""
        volume, held = self.volume(name), self.attachment(name)
        if held is None or held.epoch != epoch or volume.epoch != epoch:
            raise FencedError(_lost(name, epoch, held))
        return held

    def remove_attachment(self, volume: str, epoch: int | None = None) -> None:
        self.transact(partial(self._remove_attachment, volume, epoch))

    def _remove_attachment(self, volume: str, epoch: int | None) -> None:
        self.volume(volume)
        held = self.attachment(volume)
        if held is None:
            raise NotFoundError(f"Volume {volume!r} is not attached; there is nothing to detach.")
        if epoch is not None and held.epoch != epoch:
            raise FencedError(_lost(volume, epoch, held))
        self._delete(ATTACHMENTS, volume)


def _held(held: AttachmentRecord, host: str) -> str:
    if held.host == host:
        return (
            f"Volume {held.volume!r} is already attached at {held.socket} of host {held.host!r}; "
            f"run `ringstone volume detach {held.volume}` first to attach it elsewhere."
        )
    return (
        f"Volume {held.volume!r} is already attached at {held.socket} of host {held.host!r}. Detach it there with "
        f"`ringstone volume detach {held.volume}`; or, when that host is dead, take the volume over."
    )


def _lost(volume: str, epoch: int, held: AttachmentRecord | None) -> str:
    now = f"Host {held.host!r} has it since epoch {held.epoch}." if held else "It is attached nowhere now."
    return (
        f"Volume {volume!r} is no longer this owner's, whose epoch was {epoch}. {now} Attach it again if it is wanted "
        "here."
    )
