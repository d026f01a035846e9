"""/v1/volumes"""

from fastapi import APIRouter, status

from ringstone import models
from ringstone.api.context import ServiceDep
from ringstone.api.views import volume_views
from ringstone.gateway.service import Service
from ringstone.pools import Sealed
from ringstone.state import VolumeRecord

router = APIRouter(prefix="/volumes", tags=["volumes"])


def _view(service: Service, record: VolumeRecord) -> models.Volume:
    return volume_views(service, [record])[0]


@router.get("")
def list_volumes(service: ServiceDep, pool: str | None = None) -> list[models.Volume]:
    """By name; of one pool, or all."""
    if pool is not None:
        service.store.pool(pool)
    return volume_views(service, service.store.volumes(pool))


@router.post("", status_code=status.HTTP_201_CREATED)
def create_volume(body: models.VolumeCreate, service: ServiceDep) -> models.Volume:
    sealed = Sealed(integrity=body.integrity, encryption=body.encryption)
    made = service.volumes.create(body.name, body.pool, body.size, body.block_size, sealed=sealed)
    return _view(service, made)


@router.get("/{name}")
def show_volume(name: str, service: ServiceDep) -> models.Volume:
    return _view(service, service.store.volume(name))


@router.patch("/{name}")
def resize_volume(name: str, body: models.VolumeResize, service: ServiceDep) -> models.Volume:
    """Grow a volume, attached or not; a running guest sees the new size at once."""
    return _view(service, service.volumes.resize(name, body.size))


@router.delete("/{name}", status_code=status.HTTP_204_NO_CONTENT)
def delete_volume(name: str, service: ServiceDep) -> None:
    """The volume must not be attached. Its content is gone for good."""
    service.volumes.delete(name)
