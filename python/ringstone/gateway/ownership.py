"""Who may write a volume that several hosts reach.

The store says who the owner is: its epoch rises with every change of owner. The storage enforces it: the owner has the
exclusive lock, and whoever owned the volume before is shut out by the storage itself before the new owner serves the
first request. What must be shut out is noted in the attachment's `client` before the volume is opened, so that even a
gateway that dies right after leaves a successor who knows.
"""

import time
from collections.abc import Iterable

from ringstone.errors import BusyError, ExistsError
from ringstone.pools import SharedPool
from ringstone.state import AttachmentRecord, Store, VolumeRecord
from ringstone.state.records import JsonValue

# How long an owner that lives may take to let go by itself. Shutting it out costs its host every other volume that
# shares its connection.
_LET_GO_SECONDS = 5.0
_PAUSE_SECONDS = 0.1


def addresses(client: dict[str, JsonValue]) -> list[str]:
    """Of an attachment's `client`: of all clients that may have the volume open."""
    found = client.get("addresses")
    return [address for address in found if isinstance(address, str)] if isinstance(found, list) else []


def successor_of(previous: AttachmentRecord) -> dict[str, JsonValue]:
    """The `client` of who takes over: whom it has to shut out, and on which host that was."""
    return {"addresses": list(addresses(previous.client)), "of_host": previous.host}


def refuse_late_failover(store: Store, volume: str, held: AttachmentRecord | None, epoch: int) -> None:
    """ExistsError when somebody else was first, BusyError when the owner's host lives. In the transaction that claims
    the volume: both stay true until it is claimed."""
    if held is None or held.epoch != epoch:
        raise ExistsError(
            f"Volume {volume!r} is not in epoch {epoch} any more: it was taken over or detached meanwhile. There is "
            "nothing to do."
        )
    if store.host_alive(held.host):
        raise BusyError(
            f"Host {held.host!r}, which has volume {volume!r} attached, is alive again; it is left there."
        )


def give_back(store: Store, previous: AttachmentRecord, written: AttachmentRecord) -> None:
    """A take-over that failed, and has closed what it opened: the volume is its owner's before again, in a new epoch.
    So its next owner still knows whom to shut out."""

    def step() -> None:
        held = store.attachment(written.volume)
        if held is not None and held.epoch == written.epoch:
            store.claim(previous, take_over=True)

    store.transact(step)


def owned_backend(
    store: Store, pool: SharedPool, volume: VolumeRecord, record: AttachmentRecord
) -> dict[str, JsonValue]:
    """The engine's description of the volume for its owner. FencedError when another host is the owner by now."""
    own = pool.client()
    before = [address for address in addresses(record.client) if address != own]
    noted: dict[str, JsonValue] = {**record.client, "addresses": [*before, own]}
    store.set_attachment_client(volume.name, record.epoch, noted)
    if before and _let_go(store, pool, volume, record, before):
        before = []
    return pool.owned_backend(volume, epoch=record.epoch, predecessors=before)


def note_owner(store: Store, pool: SharedPool, record: AttachmentRecord) -> None:
    """The volume is open here, and everybody before is shut out."""
    store.set_attachment_client(record.volume, record.epoch, {"addresses": [pool.client()]})


def _let_go(
    store: Store, pool: SharedPool, volume: VolumeRecord, record: AttachmentRecord, before: Iterable[str]
) -> bool:
    """Whether the owner before has let go of the volume, or does so in time. Of a host that is dead nobody knows."""
    host = record.client.get("of_host")
    if not isinstance(host, str) or host == record.host or not store.host_alive(host):
        return False
    deadline = time.monotonic() + _LET_GO_SECONDS
    while set(before) & set(pool.owners(volume)):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_SECONDS)
    return True
