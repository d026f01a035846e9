"""A guest's whole life with its disk on Ringstone, on each QEMU, kernel and ring layout that people run."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ringstone.client import GatewayClient
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost, disk_of, wait_until
from tests.framework.qemus import KERNELS, QEMUS, image, program

MIB = 1 << 20
SIZE = 64 * MIB
# Blocks with a CRC-32C in each, written and read back.
VERIFIED = FioJob("verified", "randwrite", engine="io_uring", depth=16, size=4 * MIB, verify="write")
# Each suite's own QEMU with its own kernel; in `make soak` all of them.
SHORT = {("7.2", "6.1", False), ("10.0", "6.12", True), ("11.1", "7.3", True)}
COMBINATIONS = [
    pytest.param(*one, marks=[] if one in SHORT else [pytest.mark.soak], id="-".join((*one[:2], layout)))
    for layout, packed in (("split", False), ("packed", True))
    for one in itertools.product(QEMUS, KERNELS, (packed,))
]


@contextmanager
def working(guest: Guest) -> Iterator[None]:
    """The guest writes and verifies meanwhile, and goes on for a while after it."""
    work = guest.start(fio_command(replace(VERIFIED, extra=("--loops=6",))))
    yield
    result = parse_fio(work.wait(timeout_s=180).stdout)
    assert result.errors == 0
    assert result.write.operations == 6 * 4 * MIB // 4096


def _serves(client: GatewayClient) -> bool:
    return client.attachment("disk").state == "running"


def come_and_go(gateway: GatewayProcess, guest: Guest) -> None:
    attachment = gateway.serve("second", kind="memory", size=16 * MIB, queues=1)
    guest.plug(attachment.socket, name="second")
    wait_until(lambda: disk_of(guest, gateway, "second") is not None, "the guest has the new disk")
    path = f"/dev/{disk_of(guest, gateway, 'second')}"
    assert (
        guest.fio(FioJob("second", "randwrite", size=MIB, filename=path, verify="write")).write.operations
        == 256
    )
    guest.unplug("second")
    wait_until(lambda: disk_of(guest, gateway, "second") is None, "the guest has lost the disk")


@pytest.mark.parametrize(("qemu", "kernel", "packed"), COMBINATIONS)
def test_a_guest_lives_on_its_disk(guest_host: GuestHost, qemu: str, kernel: str, packed: bool) -> None:
    host = replace(guest_host, image=image(kernel))
    with GatewayProcess() as gateway, gateway.start().client() as client:
        gateway.serve("disk", kind="file", size=SIZE, queues=2)
        with host.boot(gateway, "disk", packed=packed, program=program(qemu)) as guest:
            assert guest.output("uname -r").startswith(kernel + ".")
            assert client.attachment("disk").packed is packed
            with working(guest):
                client.resize_volume("disk", 2 * SIZE)
                wait_until(
                    lambda: guest.output("blockdev --getsize64 /dev/vda") == str(2 * SIZE),
                    "the disk has grown",
                )
                come_and_go(gateway, guest)
            with working(guest):
                gateway.kill()
                gateway.start()
                gateway.wait_for("the guest to go on", _serves)
            with working(guest):
                gateway.upgrade()
            guest.reboot()
            assert guest.output("blockdev --getsize64 /dev/vda") == str(2 * SIZE)
            assert guest.fio(VERIFIED).errors == 0
            assert guest.output("dmesg | grep -i 'I/O error' || true") == ""
            guest.shutdown()
    assert "no room" not in gateway.log()
