"""/v1/volumes/VOLUME/snapshots, and what is made of them"""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, status

from ringstone import models
from ringstone.api.context import ServiceDep
from ringstone.api.views import volume_views
from ringstone.gateway.snapshots import Snapshots
from ringstone.pools import Snapshot

router = APIRouter(prefix="/volumes/{volume}", tags=["snapshots"])


def _view(volume: str, snapshot: Snapshot) -> models.Snapshot:
    created = datetime.fromtimestamp(snapshot.created_s, UTC)
    return models.Snapshot(
        volume=volume, name=snapshot.name, size=snapshot.size, own=snapshot.own, created_at=created
    )


@router.get("/snapshots")
def list_snapshots(volume: str, service: ServiceDep) -> list[models.Snapshot]:
    """Oldest first."""
    return [_view(volume, snapshot) for snapshot in Snapshots(service).list(volume)]


@router.post("/snapshots", status_code=status.HTTP_201_CREATED)
def create_snapshot(volume: str, body: models.SnapshotCreate, service: ServiceDep) -> models.Snapshot:
    """Holds every write that was acknowledged before; the volume may be attached. Of several volumes at one point with
    `also`; the answer is that of VOLUME."""
    return _view(volume, Snapshots(service).create(volume, body.name, body.also))


@router.delete("/snapshots/{name}", status_code=status.HTTP_204_NO_CONTENT)
def delete_snapshot(volume: str, name: str, service: ServiceDep) -> None:
    """Busy while it has clones."""
    Snapshots(service).delete(volume, name)


@router.get("/deletions")
def list_deletions(volume: str, service: ServiceDep) -> list[models.Deletion]:
    """Deleted snapshots that have blocks still, in a store pool."""
    return [
        models.Deletion(volume=volume, snapshot=one.snapshot, total=one.total, left=one.left)
        for one in Snapshots(service).deletions(volume)
    ]


@router.post("/snapshots/{name}/keep")
def keep_snapshot(volume: str, name: str, service: ServiceDep) -> models.Snapshot:
    """Take a deletion back, of which nothing was freed yet, in a store pool."""
    return _view(volume, Snapshots(service).keep(volume, name))


@router.get("/reclaimable")
def list_reclaimable(volume: str, service: ServiceDep) -> list[models.Reclaimable]:
    """What deleting each snapshot, alone, would free, in a store pool. All of the store is looked through."""
    found = Snapshots(service).reclaimable(volume)
    return [models.Reclaimable(volume=volume, snapshot=name, size=size) for name, size in found.items()]


@router.post("/snapshots/{name}/revert", status_code=status.HTTP_204_NO_CONTENT)
def revert_volume(volume: str, name: str, service: ServiceDep) -> None:
    """Give the volume the snapshot's content; it must not be attached. What was written since is gone."""
    Snapshots(service).revert(volume, name)


@router.post("/snapshots/{name}/clone", status_code=status.HTTP_201_CREATED)
def clone_snapshot(volume: str, name: str, body: models.SnapshotClone, service: ServiceDep) -> models.Volume:
    """Make a volume of it, in the same pool."""
    record = Snapshots(service).clone(volume, name, body.name)
    return volume_views(service, [record])[0]


@router.post("/clone", status_code=status.HTTP_201_CREATED)
def clone_volume(volume: str, body: models.VolumeClone, service: ServiceDep) -> models.Volume:
    """Make a volume of what it holds now, in the same store pool; it may be attached."""
    record = Snapshots(service).clone(volume, None, body.name)
    return volume_views(service, [record])[0]


@router.get("/diff")
def diff_volume(
    volume: str,
    service: ServiceDep,
    since: Annotated[str | None, Query(description="A snapshot; by default from nothing.")] = None,
    until: Annotated[str | None, Query(description="A later snapshot; by default what it holds now.")] = None,
) -> models.Difference:
    """Where its content has changed from one snapshot to another, in a store pool."""
    ranges = Snapshots(service).diff(volume, since, until)
    changed = sum(length for _, length in ranges)
    return models.Difference(volume=volume, since=since, until=until, changed=changed, ranges=list(ranges))


@router.post("/flatten", status_code=status.HTTP_204_NO_CONTENT)
def flatten_volume(volume: str, service: ServiceDep) -> None:
    """Copy what a clone still reads from its parent, so that it stands alone."""
    Snapshots(service).flatten(volume)
