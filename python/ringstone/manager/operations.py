"""What the manager changes: each change is forwarded to the host that can make it, whose errors are passed on as they
are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.errors import InvalidError, NotFoundError, UnreachableError, UntrustedError
from ringstone.gateway.events import EventLog
from ringstone.manager.hosts import Hosts
from ringstone.pools import SHARED_TYPES
from ringstone.state import PoolRecord, Store

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operations:
    """Every method may be called from any thread, blocks until done, and raises errors of ringstone.errors."""

    store: Store
    hosts: Hosts
    events: EventLog

    # pools

    def create_pool(self, request: models.PoolCreate) -> models.Pool:
        if request.type in SHARED_TYPES:
            return self.hosts.any(lambda client: client.create_pool(request))
        if request.host is None:
            raise InvalidError(
                f"A {request.type} pool is on one host; name it with --host. `ringstone host list` shows those "
                "there are."
            )
        return self.hosts.change(request.host, lambda client: client.create_pool(request))

    def delete_pool(self, name: str) -> None:
        self._at_pool(self.store.pool(name), lambda client: client.delete_pool(name))

    def grow_pool(self, name: str, size: int | None) -> models.Pool:
        return self._at_pool(self.store.pool(name), lambda client: client.grow_pool(name, size))

    def rekey_pool(self, name: str, key: models.PoolRekey) -> models.Pool:
        return self._at_pool(self.store.pool(name), lambda client: client.rekey_pool(name, key))

    def scrub_pool(self, name: str, rate: int) -> models.Pool:
        return self._at_pool(self.store.pool(name), lambda client: client.scrub_pool(name, rate))

    def cancel_scrub(self, name: str) -> None:
        self._at_pool(self.store.pool(name), lambda client: client.cancel_scrub(name))

    def _at_pool(self, pool: PoolRecord, step: Callable[[RemoteClient], T]) -> T:
        return self.hosts.any(step) if pool.host is None else self.hosts.change(pool.host, step)

    # volumes

    def create_volume(self, request: models.VolumeCreate) -> models.Volume:
        pool = self.store.pool(request.pool)
        return self._at_pool(
            pool,
            lambda client: client.create_volume(
                request.name,
                pool=request.pool,
                size=request.size,
                block_size=request.block_size,
                integrity=request.integrity,
                encryption=request.encryption,
            ),
        )

    def at_volume(self, name: str, step: Callable[[RemoteClient], T]) -> T:
        """On the host that has it attached, otherwise on one that reaches its pool."""
        volume = self.store.volume(name)
        attachment = self.store.attachment(name)
        if attachment is not None:
            return self.hosts.change(attachment.host, step)
        return self._at_pool(self.store.pool(volume.pool), step)

    # attachments

    def attach(self, request: models.AttachmentCreate) -> models.Attachment:
        pool = self.store.pool(self.store.volume(request.volume).pool)
        held = self.store.attachment(request.volume)
        if pool.host is not None:
            self._refuse_elsewhere(request, pool)
        step = request.model_copy(update={"host": None})
        host = request.host or pool.host
        if host is None and held is not None and not request.take_over:
            # Anywhere else it would be refused, and there what has failed is tried again.
            host = held.host
        if host is not None:
            return self.hosts.change(host, lambda client: client.create_attachment(step))
        without = frozenset({held.host}) if held is not None else frozenset()
        return self.attach_on_one_of(self.hosts.most_free(without), step)

    def _refuse_elsewhere(self, request: models.AttachmentCreate, pool: PoolRecord) -> None:
        if request.host not in (None, pool.host):
            raise InvalidError(
                f"Pool {pool.name!r} is on host {pool.host!r}, so its volumes cannot be attached on {request.host!r}. "
                "Leave the host out, or use a pool that every host reaches."
            )
        if request.ha:
            raise InvalidError(
                f"Pool {pool.name!r} is on host {pool.host!r} alone, so no other could take the volume over; leave ha "
                "out."
            )

    def attach_on_one_of(self, hosts: Sequence[str], request: models.AttachmentCreate) -> models.Attachment:
        """On the first of `hosts` that is reached and trusted."""
        failure: UnreachableError | UntrustedError | None = None
        for name in hosts:
            try:
                return self.hosts.change(name, lambda client: client.create_attachment(request))
            except (UnreachableError, UntrustedError) as error:
                if error.sent:
                    raise
                failure = error
        raise failure or UnreachableError(
            "No other host is alive that could serve the volume. Start a gateway with this cluster's etcd in its "
            "configuration."
        )

    def at_attachment(self, volume: str, step: Callable[[RemoteClient], T]) -> T:
        """On the host that has it attached."""
        self.store.volume(volume)
        attachment = self.store.attachment(volume)
        if attachment is None:
            raise NotFoundError(
                f"Volume {volume!r} is not attached; run `ringstone volume attach {volume}` first."
            )
        return self.hosts.change(attachment.host, step)
