"""The part of the demo that only a store shows: a snapshot, a clone of it, and the way back to it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from ringstone import models
from ringstone.client import GatewayClient
from ringstone.demo.plan import VOLUME, Check, overwrite, verified_write
from ringstone.hypervisor.guest import CommandFailed, Guest
from ringstone.progress import Progress
from ringstone.units import format_size

_SNAPSHOT = "verified"
_CLONE = "demo-clone"

Boot = Callable[[list[models.Attachment]], AbstractContextManager[Guest]]


def overwritten(guest: Guest, client: GatewayClient, progress: Progress) -> list[Check]:
    """Make a snapshot of the verified blocks and overwrite them under the guest, and see that they are overwritten."""
    with progress.step("Snapshot of the running guest's volume") as step:
        made = client.create_snapshot(VOLUME, _SNAPSHOT)
        step.detail = f"{VOLUME}@{made.name}"
    with progress.step("Guest overwrites the verified blocks") as step:
        job = overwrite()
        guest.fio(job)
        step.detail = format_size(job.size or 0)
    return [_check("The guest reads what it overwrote, not the snapshot", guest, "/dev/vda", other=True)]


def reverted(
    guest: Guest, client: GatewayClient, boot: Boot, stack: ExitStack, progress: Progress, queues: int
) -> tuple[Guest, list[Check]]:
    """Clone the snapshot, revert the volume to it, and boot a guest that finds the verified blocks on both."""
    with progress.step("Clone the snapshot, revert the volume") as step:
        guest.shutdown()
        client.clone_snapshot(VOLUME, _SNAPSHOT, _CLONE)
        client.detach(VOLUME)
        client.revert(VOLUME, _SNAPSHOT)
        attached = [client.attach(volume, queues=queues) for volume in (VOLUME, _CLONE)]
        step.detail = f"{_CLONE} beside {VOLUME}"
    with progress.step("Guest boots with both") as step:
        guest = stack.enter_context(boot(attached))
        step.detail = guest.output("cat /proc/version").split(" (")[0]
    with progress.step("Verification of both") as step:
        checks = [
            _check("The reverted volume holds the verified blocks", guest, "/dev/vda"),
            _check("The clone holds the verified blocks", guest, "/dev/vdb"),
        ]
        step.detail = "; ".join(check.detail if check.passed else "FAILED" for check in checks)
    return guest, checks


def put_away(client: GatewayClient) -> None:
    """What reverted() made beside the volume."""
    client.detach(_CLONE)
    client.delete_volume(_CLONE)


def _check(title: str, guest: Guest, disk: str, *, other: bool = False) -> Check:
    """Whether the verified blocks are on `disk`; with `other` whether they are not."""
    job = verified_write()
    try:
        checked = guest.fio(replace(job, verify="only", filename=disk)).read.operations
    except CommandFailed as error:
        return Check(title, other, "fio finds other blocks" if other else str(error))
    blocks = (job.size or 0) // job.block_size
    return Check(title, not other and checked == blocks, f"{checked} of {blocks} blocks verified")
