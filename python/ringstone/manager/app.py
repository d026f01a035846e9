"""The manager's FastAPI application. Its calls are those of a gateway wherever both have them, so that a client talks
to either. Endpoints are plain functions, which Starlette runs in threads."""

import os
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request, status

from ringstone import models
from ringstone.api.answers import ERRORS, add_error_handlers
from ringstone.api.health import HealthLook, health_of
from ringstone.errors import InvalidError
from ringstone.manager import views
from ringstone.manager.operations import Operations
from ringstone.stats import Snapshot
from ringstone.units import utc
from ringstone.version import version


@dataclass(frozen=True, slots=True)
class ManagerContext:
    """`state`: where it is, for people. `started_ns` is CLOCK_REALTIME."""

    operations: Operations
    url: str
    state: str
    started_ns: int
    failover_grace_s: float | None


async def _context(request: Request) -> ManagerContext:
    context = request.app.state.context
    assert isinstance(context, ManagerContext)
    return context


async def _operations(request: Request) -> Operations:
    return (await _context(request)).operations


ContextDep = Annotated[ManagerContext, Depends(_context)]
Manager = Annotated[Operations, Depends(_operations)]

router = APIRouter(prefix="/v1", responses=ERRORS)


def build_app(context: ManagerContext) -> FastAPI:
    app = FastAPI(
        title="Ringstone manager",
        version="1",
        description="Hosts, pools, volumes, snapshots and attachments of a cluster. Sizes are bytes.",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    app.state.health = HealthLook(lambda: views.health(context.operations))
    app.include_router(router)
    add_error_handlers(app)
    return app


# hosts


@router.get("/hosts", tags=["hosts"])
def list_hosts(manager: Manager) -> list[models.Host]:
    """By name."""
    return views.host_views(manager)


@router.get("/hosts/{name}", tags=["hosts"])
def show_host(name: str, manager: Manager) -> models.Host:
    return views.host_view(manager, name)


@router.delete("/hosts/{name}", tags=["hosts"], status_code=status.HTTP_204_NO_CONTENT)
def remove_host(name: str, manager: Manager) -> None:
    """A dead one that has no pools and no attachments. A gateway that starts there adds it again."""
    manager.store.remove_host(name)
    manager.events.say("info", f"Removed host {name}.")


# pools


@router.get("/pools", tags=["pools"])
def list_pools(manager: Manager) -> list[models.Pool]:
    """By name."""
    return views.pool_views(manager, manager.store.pools())


@router.post("/pools", tags=["pools"], status_code=status.HTTP_201_CREATED)
def create_pool(body: models.PoolCreate, manager: Manager) -> models.Pool:
    """`host` must be named unless every host reaches the pool."""
    return manager.create_pool(body)


@router.get("/pools/{name}", tags=["pools"])
def show_pool(name: str, manager: Manager) -> models.Pool:
    return views.pool_views(manager, [manager.store.pool(name)])[0]


@router.post("/pools/{name}/grow", tags=["pools"])
def grow_pool(name: str, manager: Manager, body: models.PoolGrow | None = None) -> models.Pool:
    """Use all of a store pool's drive that has become longer; volumes are served meanwhile."""
    return manager.grow_pool(name, body.size if body else None)


@router.post("/pools/{name}/rekey", tags=["pools"])
def rekey_pool(name: str, manager: Manager, body: models.PoolRekey) -> models.Pool:
    """Have another key wrap the keys of a store pool's encrypted volumes; they are served meanwhile."""
    return manager.rekey_pool(name, body)


@router.post("/pools/{name}/scrub", tags=["pools"])
def scrub_pool(name: str, manager: Manager, body: models.ScrubStart | None = None) -> models.Pool:
    """Begin to read all that a store pool has in use."""
    return manager.scrub_pool(name, (body or models.ScrubStart()).rate)


@router.delete("/pools/{name}/scrub", tags=["pools"], status_code=status.HTTP_204_NO_CONTENT)
def cancel_scrub(name: str, manager: Manager) -> None:
    manager.cancel_scrub(name)


@router.delete("/pools/{name}", tags=["pools"], status_code=status.HTTP_204_NO_CONTENT)
def delete_pool(name: str, manager: Manager) -> None:
    """The pool must have no volumes."""
    manager.delete_pool(name)


# volumes


@router.get("/volumes", tags=["volumes"])
def list_volumes(manager: Manager, pool: str | None = None) -> list[models.Volume]:
    """By name; of one pool, or all."""
    if pool is not None:
        manager.store.pool(pool)
    return views.volume_views(manager, manager.store.volumes(pool))


@router.post("/volumes", tags=["volumes"], status_code=status.HTTP_201_CREATED)
def create_volume(body: models.VolumeCreate, manager: Manager) -> models.Volume:
    return manager.create_volume(body)


@router.get("/volumes/{name}", tags=["volumes"])
def show_volume(name: str, manager: Manager) -> models.Volume:
    return views.volume_views(manager, [manager.store.volume(name)])[0]


@router.patch("/volumes/{name}", tags=["volumes"])
def resize_volume(name: str, body: models.VolumeResize, manager: Manager) -> models.Volume:
    """Grow a volume, attached or not; a running guest sees the new size at once."""
    return manager.at_volume(name, lambda client: client.resize_volume(name, body.size))


@router.delete("/volumes/{name}", tags=["volumes"], status_code=status.HTTP_204_NO_CONTENT)
def delete_volume(name: str, manager: Manager) -> None:
    """The volume must not be attached. Its content is gone for good."""
    manager.at_volume(name, lambda client: client.delete_volume(name))


# snapshots


@router.get("/volumes/{volume}/snapshots", tags=["snapshots"])
def list_snapshots(volume: str, manager: Manager) -> list[models.Snapshot]:
    """Oldest first."""
    return manager.at_volume(volume, lambda client: client.snapshots(volume))


@router.post("/volumes/{volume}/snapshots", tags=["snapshots"], status_code=status.HTTP_201_CREATED)
def create_snapshot(volume: str, body: models.SnapshotCreate, manager: Manager) -> models.Snapshot:
    """Of several volumes of one store pool at one point with `also`."""
    return manager.at_volume(volume, lambda client: client.create_snapshot(volume, body.name, also=body.also))


@router.delete(
    "/volumes/{volume}/snapshots/{name}", tags=["snapshots"], status_code=status.HTTP_204_NO_CONTENT
)
def delete_snapshot(volume: str, name: str, manager: Manager) -> None:
    """Busy while it has clones."""
    manager.at_volume(volume, lambda client: client.delete_snapshot(volume, name))


@router.get("/volumes/{volume}/deletions", tags=["snapshots"])
def list_deletions(volume: str, manager: Manager) -> list[models.Deletion]:
    """Deleted snapshots that have blocks still, in a store pool."""
    return manager.at_volume(volume, lambda client: client.deletions(volume))


@router.post("/volumes/{volume}/snapshots/{name}/keep", tags=["snapshots"])
def keep_snapshot(volume: str, name: str, manager: Manager) -> models.Snapshot:
    """Take a deletion back, of which nothing was freed yet, in a store pool."""
    return manager.at_volume(volume, lambda client: client.keep_snapshot(volume, name))


@router.get("/volumes/{volume}/reclaimable", tags=["snapshots"])
def list_reclaimable(volume: str, manager: Manager) -> list[models.Reclaimable]:
    """What deleting each snapshot, alone, would free, in a store pool. All of the store is looked through."""
    return manager.at_volume(volume, lambda client: client.reclaimable(volume))


@router.post(
    "/volumes/{volume}/snapshots/{name}/revert", tags=["snapshots"], status_code=status.HTTP_204_NO_CONTENT
)
def revert_volume(volume: str, name: str, manager: Manager) -> None:
    """Give the volume the snapshot's content; it must not be attached. What was written since is gone."""
    manager.at_volume(volume, lambda client: client.revert(volume, name))


@router.post(
    "/volumes/{volume}/snapshots/{name}/clone", tags=["snapshots"], status_code=status.HTTP_201_CREATED
)
def clone_snapshot(volume: str, name: str, body: models.SnapshotClone, manager: Manager) -> models.Volume:
    """Make a volume of it, in the same pool."""
    return manager.at_volume(volume, lambda client: client.clone_snapshot(volume, name, body.name))


@router.post("/volumes/{volume}/clone", tags=["snapshots"], status_code=status.HTTP_201_CREATED)
def clone_volume(volume: str, body: models.VolumeClone, manager: Manager) -> models.Volume:
    """Make a volume of what it holds now, in the same store pool; it may be attached."""
    return manager.at_volume(volume, lambda client: client.clone_volume(volume, body.name))


@router.get("/volumes/{volume}/diff", tags=["snapshots"])
def diff_volume(
    volume: str, manager: Manager, since: str | None = None, until: str | None = None
) -> models.Difference:
    """Where its content has changed from one snapshot to another, in a store pool."""
    return manager.at_volume(volume, lambda client: client.diff(volume, since=since, until=until))


@router.post("/volumes/{volume}/flatten", tags=["snapshots"], status_code=status.HTTP_204_NO_CONTENT)
def flatten_volume(volume: str, manager: Manager) -> None:
    """Copy what a clone still reads from its parent, so that it stands alone."""
    manager.at_volume(volume, lambda client: client.flatten(volume))


# attachments


@router.get("/attachments", tags=["attachments"])
def list_attachments(manager: Manager) -> list[models.Attachment]:
    """By volume."""
    return views.attachment_views(manager, manager.store.attachments())


@router.post("/attachments", tags=["attachments"], status_code=status.HTTP_201_CREATED)
def attach_volume(body: models.AttachmentCreate, manager: Manager) -> models.Attachment:
    """On `host`; by default on its pool's, or where there are most free cores. With `take_over` also when another host
    has it attached, dead or alive."""
    return manager.attach(body)


@router.get("/attachments/{volume}", tags=["attachments"])
def show_attachment(volume: str, manager: Manager) -> models.Attachment:
    return views.attachment_view(manager, volume)


@router.put(
    "/attachments/{volume}/queues/{queue}", tags=["attachments"], status_code=status.HTTP_202_ACCEPTED
)
def move_queue(volume: str, queue: int, body: models.QueueMove, manager: Manager) -> None:
    """Move a running queue to another reactor of its host."""
    manager.at_attachment(volume, lambda client: client.move_queue(volume, queue, body.core))


@router.put("/attachments/{volume}/sharing", tags=["attachments"])
def share_attachment(volume: str, body: models.Sharing, manager: Manager) -> models.Attachment:
    """Whether a second frontend may connect, for a live migration on that host."""
    return manager.at_attachment(volume, lambda client: client.share(volume, body.shared))


@router.post("/attachments/{volume}/release", tags=["attachments"])
def release_attachment(volume: str, manager: Manager) -> models.Attachment:
    """For a live migration to another host, once the guest stands still: that host may own the volume then."""
    return manager.at_attachment(volume, lambda client: client.release(volume))


@router.delete("/attachments/{volume}", tags=["attachments"], status_code=status.HTTP_204_NO_CONTENT)
def detach_volume(volume: str, manager: Manager, force: bool = False, host: str | None = None) -> None:
    """`force` also while a frontend is connected: its guest's requests fail from then on. `host`: where it waits for
    its guest; otherwise it is detached where it is attached."""
    if host is not None:
        manager.hosts.change(host, lambda client: client.detach(volume, force=force))
    else:
        manager.at_attachment(volume, lambda client: client.detach(volume, force=force))


# the manager


@router.get("/stats", tags=["stats"])
def show_stats(manager: Manager, volume: str | None = None) -> Snapshot:
    """Of an attached volume, from its host."""
    if volume is None:
        raise InvalidError(
            "A manager has the counters of one volume at a time; name it, or ask a host's gateway."
        )
    name = volume
    return manager.at_attachment(name, lambda client: client.stats(volume=name))


@router.get("/manager", tags=["manager"])
def show_manager(context: ContextDep) -> models.ManagerInfo:
    store = context.operations.store
    return models.ManagerInfo(
        version=version(),
        pid=os.getpid(),
        started_at=utc(context.started_ns),
        url=context.url,
        state=context.state,
        hosts=len(store.hosts()),
        hosts_alive=len(store.alive_hosts()),
        pools=len(store.pools()),
        volumes=len(store.volumes()),
        attachments=len(store.attachments()),
        failover_grace_s=context.failover_grace_s,
    )


@router.get("/health", tags=["manager"])
async def show_health(request: Request) -> models.Health:
    """Asks every living host. Comes back though one of them hangs, and says so."""
    return await health_of(request)


@router.get("/events", tags=["manager"])
def list_events(
    manager: Manager, limit: Annotated[int, Query(ge=1, le=1000)] = 100, volume: str | None = None
) -> list[models.Event]:
    """Of this manager since its start, oldest first: what it took over, and what it could not."""
    return [
        models.Event(at=utc(event.at_ns), level=event.level, volume=event.volume, message=event.message)
        for event in manager.events.latest(1000)
        if volume is None or event.volume == volume
    ][-limit:]
