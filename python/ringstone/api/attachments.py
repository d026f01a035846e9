"""/v1/attachments, named by their volume"""

from fastapi import APIRouter, status

from ringstone import models
from ringstone.api.context import ServiceDep
from ringstone.api.views import attachment_views
from ringstone.errors import NotFoundError
from ringstone.gateway.rights import SocketRights

router = APIRouter(prefix="/attachments", tags=["attachments"])


@router.get("")
def list_attachments(service: ServiceDep) -> list[models.Attachment]:
    """By volume."""
    return attachment_views(service, service.store.attachments())


@router.post("", status_code=status.HTTP_201_CREATED)
def attach_volume(body: models.AttachmentCreate, service: ServiceDep) -> models.Attachment:
    """Listen on the socket for a frontend. Comes back after a restart of the gateway or the host."""
    service.refuse_other_host(body.host)
    record = service.attach(
        body.volume,
        socket=body.socket,
        queues=body.queues,
        read_only=body.read_only,
        ha=body.ha,
        take_over=body.take_over,
        failover_epoch=body.failover_epoch,
        incoming=body.incoming,
        rights=SocketRights(body.socket_owner, body.socket_group, body.socket_mode),
    )
    return attachment_views(service, [record])[0]


@router.get("/{volume}")
def show_attachment(volume: str, service: ServiceDep) -> models.Attachment:
    service.store.volume(volume)
    record = service.store.attachment(volume)
    if record is None:
        raise NotFoundError(
            f"Volume {volume!r} is not attached; run `ringstone volume attach {volume}` first."
        )
    return attachment_views(service, [record])[0]


@router.put("/{volume}/queues/{queue}", status_code=status.HTTP_202_ACCEPTED)
def move_queue(volume: str, queue: int, body: models.QueueMove, service: ServiceDep) -> None:
    """Move a running queue to another reactor; it arrives when its requests in flight are done."""
    service.move_queue(volume, queue, body.core)


@router.put("/{volume}/sharing")
def share_attachment(volume: str, body: models.Sharing, service: ServiceDep) -> models.Attachment:
    """For a live migration: while shared, the destination's frontend may connect beside the source's. Busy when it is
    to end while two are connected."""
    return attachment_views(service, [service.share(volume, body.shared)])[0]


@router.post("/{volume}/release")
def release_attachment(volume: str, service: ServiceDep) -> models.Attachment:
    """For a live migration to another host, once the guest stands still: that host may own the volume then. Busy while
    queues run."""
    return attachment_views(service, [service.release(volume)])[0]


@router.delete("/{volume}", status_code=status.HTTP_204_NO_CONTENT)
def detach_volume(volume: str, service: ServiceDep, force: bool = False, host: str | None = None) -> None:
    """`force` also while a frontend is connected: its guest's requests fail from then on."""
    service.refuse_other_host(host)
    service.detach(volume, force=force)
