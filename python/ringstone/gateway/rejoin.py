"""A host that started without etcd, and served what it had owned, meets the others again."""

from ringstone.errors import RingstoneError
from ringstone.gateway import ownership
from ringstone.gateway.service import Service
from ringstone.pools import SharedPool
from ringstone.state import AttachmentRecord


def rejoin(service: Service) -> None:
    """Go on with etcd: let go of what has another owner by now, say whom a successor must fence, and serve what was not
    known. UnreachableError while etcd is away."""
    from ringstone.state.remembered import RememberingStore

    store = service.store
    assert isinstance(store, RememberingStore)
    store.come_back()
    service.restore_volumes()
    held = {record.volume: record for record in store.attachments()}
    for name in service.served():
        record = held.get(name)
        if service.has_lost(name, record):
            service.give_up(name, record)
        elif record is not None:
            _note_owner(service, record)
    for name, record in held.items():
        if service.is_idle(name, record):
            service.take_up(name, "It was not known while etcd was away.")
    store.remember()
    service.events.say("info", "The cluster's state is within reach for the first time since the start.")


def _note_owner(service: Service, record: AttachmentRecord) -> None:
    pool = service.pools.reach(service.store.volume(record.volume).pool)
    if isinstance(pool, SharedPool) and not record.read_only:
        try:
            with service.locks.hold(f"volume {record.volume}"):
                ownership.note_owner(service.store, pool, record)
        except RingstoneError as error:
            service.events.say("warning", f"Its successor will not know of it: {error}", volume=record.volume)
