"""Real guests on volumes of a gateway under test."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringstone.hypervisor.accelerator import Accelerator, choose_accelerator
from ringstone.hypervisor.args import Disk
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.guest_image import GuestImage, ensure_guest_image
from ringstone.hypervisor.qemu import QemuConfig
from tests.framework.gateway import GatewayProcess

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class GuestHost:
    """What this machine boots guests with."""

    image: GuestImage
    accelerator: Accelerator
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def boot(
        self,
        gateway: GatewayProcess,
        *volumes: str,
        cpus: int = 2,
        packed: bool = True,
        more: Sequence[str] = (),
        program: Path | None = None,
        kernel_arguments: str = "",
    ) -> Iterator[Guest]:
        """A guest with the attached `volumes` as disks vda, vdb and so on; QEMU is gone at the end. `more`: further
        arguments of QEMU's; `program`: another one than the installed one; `kernel_arguments`: those of virtio_blk
        too, as virtio_blk.NAME=VALUE."""
        disks = []
        with gateway.client() as client:
            for volume in volumes:
                attachment = client.attachment(volume)
                disks.append(Disk(attachment.socket, volume, attachment.queues, packed=packed))
        folder = gateway.root / f"guest-{next(self._numbers)}"
        config = QemuConfig(
            self.image,
            self.accelerator.name,
            folder,
            disks,
            more,
            cpus=cpus,
            program=program,
            kernel_arguments=kernel_arguments,
        )
        with Guest(config) as guest:
            yield guest


@pytest.fixture(scope="session")
def guest_host() -> GuestHost:
    """Builds the guest image and tries KVM the first time on a machine."""
    image = ensure_guest_image()
    return GuestHost(image, choose_accelerator(image))


def disk_of(guest: Guest, gateway: GatewayProcess, volume: str) -> str | None:
    """The guest's name (vda) for the disk whose serial number is the volume's; None when it has none."""
    with gateway.client() as client:
        wanted = client.volume(volume).serial
    serials = guest.output('for disk in /sys/block/vd*; do echo "${disk##*/} $(cat "$disk/serial")"; done')
    by_serial = {serial: disk for disk, serial in (line.split(" ", 1) for line in serials.splitlines())}
    return by_serial.get(wanted)


def backing_of(gateway: GatewayProcess, volume: str) -> Path:
    """The file on the host that holds the volume's blocks."""
    with gateway.client() as client:
        path = client.pool(client.volume(volume).pool).path
    assert path is not None
    return Path(path) / f"{volume}.raw"


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 30) -> None:
    """Wait for what another process does and announces to nobody."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"After {timeout_s} s it is still not so that {what}."
        time.sleep(_POLL_SECONDS)
