"""What the manager shows: records of the store, with what is live asked of the hosts. A host that does not answer is
shown as such."""

from collections import Counter
from collections.abc import Iterable
from time import time_ns

from ringstone import models
from ringstone.errors import NotFoundError, RingstoneError
from ringstone.manager.operations import Operations
from ringstone.state import AttachmentRecord, HostRecord, PoolRecord, VolumeRecord
from ringstone.state.records import LEASE_SECONDS
from ringstone.units import utc

# Seconds by which clocks may differ, beside what an announcement is old.
_CLOCK_SECONDS = 5

Live = models.Volume | RingstoneError | None


# hosts


def host_views(manager: Operations) -> list[models.Host]:
    """By name."""
    return _host_views(manager, manager.store.hosts())


def host_view(manager: Operations, name: str) -> models.Host:
    return _host_views(manager, [manager.hosts.record(name)])[0]


def _host_views(manager: Operations, records: list[HostRecord]) -> list[models.Host]:
    """Each is asked, as nothing else tells whether its gateway can be used from here."""
    store = manager.store
    alive = store.alive_hosts()
    told = manager.hosts.look_at(
        (record.name for record in records if record.name in alive), lambda client: client.health()
    )
    reasons = {name: answer.message for name, answer in told.items() if isinstance(answer, RingstoneError)}
    pools = Counter(pool.host for pool in store.pools())
    attachments = Counter(attachment.host for attachment in store.attachments())
    return [
        models.Host(
            name=record.name,
            id=record.id,
            addresses=list(record.addresses),
            version=record.version,
            alive=record.name in alive,
            reason=reasons.get(record.name),
            cores=list(record.cores),
            free_cores=record.free_cores,
            pools=pools[record.name],
            attachments=attachments[record.name],
            seen_at=utc(record.seen_ns),
            created_at=utc(record.created_ns),
        )
        for record in records
    ]


# pools


def pool_views(manager: Operations, records: list[PoolRecord]) -> list[models.Pool]:
    """Each as a host that reaches it tells it."""
    least = next(iter(manager.hosts.by_load()), None)
    places = {record.name: record.host or least for record in records}
    told = manager.hosts.look_at(
        (place for place in places.values() if place is not None),
        lambda client: {pool.name: pool for pool in client.pools()},
    )
    volumes = manager.store.volumes()
    views = []
    for record in records:
        answer = told.get(places[record.name] or "")
        live = answer.get(record.name) if isinstance(answer, dict) else None
        reason = answer.message if isinstance(answer, RingstoneError) else "No host is alive that reaches it."
        views.append(live or _pool_of_record(record, volumes, reason))
    return views


def _pool_of_record(record: PoolRecord, volumes: list[VolumeRecord], reason: str) -> models.Pool:
    own = [volume for volume in volumes if volume.pool == record.name]
    return models.Pool(
        name=record.name,
        type=record.type,
        host=record.host,
        path=record.path,
        capacity=record.capacity,
        state="failed",
        reason=reason,
        total=None,
        free=None,
        provisioned=sum(volume.size for volume in own),
        volumes=len(own),
        created_at=utc(record.created_ns),
    )


# volumes and attachments


def volume_views(manager: Operations, records: list[VolumeRecord]) -> list[models.Volume]:
    """One question to each host that has something of them."""
    attachments = {record.volume: record for record in manager.store.attachments()}
    pools = {pool.name: pool for pool in manager.store.pools()}
    places = {record.name: _place(attachments.get(record.name), pools.get(record.pool)) for record in records}
    told = manager.hosts.look_at(
        (place for place in places.values() if place is not None),
        lambda client: {volume.name: volume for volume in client.volumes()},
    )
    views = []
    for record in records:
        answer = told.get(places[record.name] or "")
        live: Live = answer if isinstance(answer, RingstoneError) else (answer or {}).get(record.name)
        views.append(_volume_view(record, attachments.get(record.name), live))
    return views


def _place(attachment: AttachmentRecord | None, pool: PoolRecord | None) -> str | None:
    """The host that knows more of a volume than the store."""
    return attachment.host if attachment is not None else pool.host if pool is not None else None


def _volume_view(record: VolumeRecord, held: AttachmentRecord | None, live: Live) -> models.Volume:
    view = models.Volume(
        name=record.name,
        id=record.id,
        serial=record.serial,
        pool=record.pool,
        size=record.size,
        block_size=record.block_size,
        state=record.state.value,
        reason=None,
        allocated=None,
        detail=None,
        attachment=None if held is None else _attachment_view(held, live),
        created_at=utc(record.created_ns),
    )
    if not isinstance(live, models.Volume):
        return view
    told = {
        name: getattr(live, name)
        for name in ("state", "reason", "allocated", "shared", "integrity", "encryption", "detail")
    }
    return view.model_copy(update=told)


def attachment_views(manager: Operations, records: Iterable[AttachmentRecord]) -> list[models.Attachment]:
    held = list(records)
    told = manager.hosts.look_at(
        (record.host for record in held),
        lambda client: {volume.name: volume for volume in client.volumes()},
    )
    views = []
    for record in held:
        answer = told[record.host]
        live: Live = answer if isinstance(answer, RingstoneError) else answer.get(record.volume)
        views.append(_attachment_view(record, live))
    return views


def attachment_view(manager: Operations, volume: str) -> models.Attachment:
    manager.store.volume(volume)
    record = manager.store.attachment(volume)
    if record is None:
        raise NotFoundError(
            f"Volume {volume!r} is not attached; run `ringstone volume attach {volume}` first."
        )
    return attachment_views(manager, [record])[0]


def _attachment_view(record: AttachmentRecord, live: Live) -> models.Attachment:
    told = live.attachment if isinstance(live, models.Volume) else None
    if told is not None and (told.host, told.epoch) == (record.host, record.epoch):
        return told
    reason = "Its host knows nothing of it yet." if not isinstance(live, RingstoneError) else live.message
    return models.Attachment(
        volume=record.volume,
        host=record.host,
        epoch=record.epoch,
        ha=record.ha,
        socket=record.socket,
        socket_owner=record.socket_owner,
        socket_group=record.socket_group,
        socket_mode=record.socket_mode,
        queues=record.queues,
        read_only=record.read_only,
        state="unreachable",
        reason=reason,
        created_at=utc(record.created_ns),
    )


# health


def health(manager: Operations) -> models.Health:
    """Dead hosts, hosts that do not answer, clocks that differ, and whatever a host says of itself."""
    alive = manager.store.alive_hosts()
    records = manager.store.hosts()
    hosts = [host.name for host in records]
    attached = Counter(attachment.host for attachment in manager.store.attachments())
    reasons = [
        f"Host {name} is dead, with {attached[name]} volumes attached there."
        for name in hosts
        if name not in alive
    ]
    reasons += filter(None, (clock_trouble(host, time_ns()) for host in records if host.name in alive))
    told = manager.hosts.look_at((name for name in hosts if name in alive), lambda client: client.health())
    for name in sorted(told):
        answer = told[name]
        if isinstance(answer, RingstoneError):
            reasons.append(f"Host {name} does not answer: {answer.message}")
        else:
            reasons += [f"Host {name}: {reason}" for reason in answer.reasons]
    return models.Health(status="degraded" if reasons else "ok", reasons=reasons)


def clock_trouble(host: HostRecord, now_ns: int) -> str | None:
    """What is wrong between the clock of a living host and ours; None when they agree to the seconds that its
    announcements leave open. Nothing of ours compares clocks, but certificates and cephx's tickets are by them."""
    age = (now_ns - host.seen_ns) / 1e9
    if -_CLOCK_SECONDS <= age <= LEASE_SECONDS + _CLOCK_SECONDS:
        return None
    off = f"{-age:.0f} s ahead of" if age < 0 else f"{age:.0f} s behind"
    return (
        f"The clock of host {host.name} is {off} this manager's. Run NTP on both (`timedatectl` tells which is off): "
        "certificates and Ceph's keys are refused when a clock is far off."
    )
