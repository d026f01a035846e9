"""From the gateway's plain records to what crosses the API."""

import dataclasses

from ringstone import models
from ringstone.errors import RingstoneError
from ringstone.gateway.engine import EngineAttachment, EngineVolume
from ringstone.gateway.service import Service
from ringstone.pools import DrivePool, LayerPool, Pool, Scrub, Space, Usage, keys, open_pool
from ringstone.state import AttachmentRecord, PoolRecord, VolumeRecord, VolumeState
from ringstone.units import utc


def pool_view(service: Service, record: PoolRecord) -> models.Pool:
    volumes = service.store.volumes(record.name)
    pool = open_pool(record)
    reason = None
    usage = Usage(None, None)
    space = scrub = None
    try:
        # What only another host reaches is that one's to judge.
        if service.pools.reaches(record):
            pool.check()
            if isinstance(pool, DrivePool):
                space, scrub = pool.space(), pool.scrub()
                service.space.note(record.name, space)
                usage = Usage(space.capacity, space.free)
            else:
                usage = pool.usage()
    except RingstoneError as error:
        reason = error.message
    return models.Pool(
        name=record.name,
        type=record.type,
        host=record.host,
        path=record.path,
        capacity=record.capacity,
        state="failed" if reason else "ready",
        reason=reason,
        total=usage.total,
        free=usage.free,
        space=None if space is None else _space_view(space),
        key=_key_of(record),
        scrub=None if scrub is None else _scrub_view(scrub),
        provisioned=sum(volume.size for volume in volumes),
        volumes=len(volumes),
        created_at=utc(record.created_ns),
    )


def _key_of(record: PoolRecord) -> str | None:
    source = keys.of(record.options) if record.type == "store" else None
    return None if source is None else str(source)


def _scrub_view(scrub: Scrub) -> models.Scrub:
    given = dataclasses.asdict(scrub)
    started_s, ended_s = given.pop("started_s"), given.pop("ended_s")
    return models.Scrub(
        started_at=utc(started_s * 1_000_000_000),
        ended_at=None if ended_s is None else utc(ended_s * 1_000_000_000),
        **given,
    )


def _space_view(space: Space) -> models.Space:
    return models.Space(
        size=space.size,
        capacity=space.capacity,
        used=space.used,
        free=space.free,
        promised=space.promised,
        promised_at_most=space.promised_at_most,
        reclaiming=space.reclaiming,
    )


def volume_views(service: Service, records: list[VolumeRecord]) -> list[models.Volume]:
    """One question to the engine for all of them, and one pool for all of its volumes, which asks the medium once."""
    opened = {volume.name: volume for volume in service.engine.volumes()}
    attached = {view.volume: view for view in attachment_views(service, service.store.attachments())}
    pools = {name: open_pool(service.store.pool(name)) for name in {record.pool for record in records}}
    return [
        _volume_view(service, record, pools[record.pool], opened.get(record.name), attached.get(record.name))
        for record in records
    ]


def _volume_view(
    service: Service,
    record: VolumeRecord,
    pool: Pool,
    opened: EngineVolume | None,
    attachment: models.Attachment | None,
) -> models.Volume:
    reason = service.volumes.failure(record, pool)
    state = "failed" if reason and record.state is VolumeState.READY else record.state.value
    reached = service.pools.reaches(pool.record)
    layers = pool if reached and isinstance(pool, LayerPool) else None
    sealed = layers.sealed(record) if layers else None
    return models.Volume(
        name=record.name,
        id=record.id,
        serial=record.serial,
        pool=record.pool,
        size=record.size,
        block_size=record.block_size,
        state=state,
        reason=reason,
        allocated=pool.allocated(record) if reached else None,
        shared=layers.shared(record) if layers else None,
        integrity=sealed.integrity if sealed else None,
        encryption=sealed.encryption if sealed else None,
        detail=opened.detail if opened else None,
        attachment=attachment,
        created_at=utc(record.created_ns),
    )


def _state_elsewhere(service: Service, volume: str) -> str:
    return "incoming" if service.is_incoming(volume) else "elsewhere"


def attachment_views(service: Service, records: list[AttachmentRecord]) -> list[models.Attachment]:
    served = {one.volume: one for one in service.engine.attachments()}
    return [_attachment_view(service, record, served.get(record.volume)) for record in records]


def _attachment_view(
    service: Service, record: AttachmentRecord, served: EngineAttachment | None
) -> models.Attachment:
    base = models.Attachment(
        volume=record.volume,
        host=record.host,
        epoch=record.epoch,
        ha=record.ha,
        socket=record.socket,
        socket_owner=record.socket_owner,
        socket_group=record.socket_group,
        socket_mode=record.socket_mode,
        socket_rights=str(service.sockets.rights(record)) if record.host == service.host else None,
        queues=record.queues,
        read_only=record.read_only,
        state="failed" if record.host == service.host else _state_elsewhere(service, record.volume),
        reason=service.attachment_failure(record.volume),
        created_at=utc(record.created_ns),
    )
    if served is None or record.host != service.host:
        return base
    return base.model_copy(
        update={
            "state": served.state,
            "reason": None,
            "peer_pid": served.peer_pid,
            "features": served.features,
            "protocol_features": served.protocol_features,
            "memory_bytes": served.memory_bytes,
            "memory_regions": served.memory_regions,
            "packed": served.packed,
            "shared": served.shared,
            "frontends": served.frontends,
            "queue_states": [
                models.Queue(
                    index=queue.index, entries=queue.entries, reactor=queue.reactor, running=queue.running
                )
                for queue in served.queues
            ],
        }
    )
