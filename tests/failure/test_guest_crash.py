"""A Linux guest in QEMU whose gateway is killed or replaced under it: its disk waits a moment, and is as it was."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from ringstone.client import GatewayClient
from ringstone.hypervisor.fio import FioJob, fio_command
from ringstone.hypervisor.guest import Guest
from tests.framework.chance import chance as chance
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost
from tests.framework.guest import guest_host as guest_host

pytestmark = pytest.mark.guest

MIB = 1 << 20
# virtio 1.2, 6: VIRTIO_F_RING_PACKED.
RING_PACKED = 1 << 34
# Blocks with a CRC-32C in each, written and read back: what fio verifies is what the guest's kernel believes.
VERIFIED = FioJob("verified", "randwrite", engine="io_uring", depth=16, size=8 * MIB, verify="write")
ROUNDS = pytest.mark.parametrize("rounds", [2, pytest.param(8, marks=pytest.mark.soak)])


@dataclass(frozen=True)
class Machine:
    """A running guest with one volume, `disk`, and its gateway."""

    guest: Guest
    gateway: GatewayProcess
    chance: random.Random

    def kill_gateway(self) -> None:
        """At a moment of the load's; when this returns the guest's disk is served again."""
        time.sleep(self.chance.uniform(0, 0.5))
        self.gateway.kill()
        self.gateway.forget_starts()
        self.gateway.start()
        self.gateway.wait_for("the guest to go on", _served)

    @contextmanager
    def working(self, script: str) -> Iterator[None]:
        """The guest does `script` over and over, at least once. It must succeed each time."""
        until = f"until [ -e /tmp/enough ]; do {{ {script}; }} >/tmp/said 2>&1 || {{ cat /tmp/said; exit 1; }}; done"
        self.guest.run("rm -f /tmp/enough")
        work = self.guest.start(f"{{ {script}; }} && {until}")
        try:
            yield
        finally:
            self.guest.run("touch /tmp/enough")
            work.wait(timeout_s=120)

    def has_no_complaints(self) -> None:
        assert self.guest.output("dmesg | grep -i -e 'I/O error' -e 'EXT4-fs error' -e hung || true") == ""


def _served(client: GatewayClient) -> bool:
    (attachment,) = client.attachments()
    assert attachment.state != "needs_reset", "the rings were not taken up where they were"
    queues = client.stats(volume="disk").of_volume("disk")
    assert sum(queue.errors for queue in queues) == 0
    return attachment.state == "running" and sum(queue.reads + queue.writes for queue in queues) > 0


@pytest.fixture(scope="module", params=[False, True], ids=["split", "packed"])
def booted(request: pytest.FixtureRequest, guest_host: GuestHost) -> Iterator[tuple[Guest, GatewayProcess]]:
    with GatewayProcess() as gateway:
        gateway.start()
        gateway.serve("disk", kind="file", size=128 * MIB, queues=2)
        with guest_host.boot(gateway, "disk", packed=request.param) as guest:
            with gateway.client() as client:
                attachment = client.attachment("disk")
            assert attachment.packed is request.param
            assert bool(attachment.features & RING_PACKED) is request.param
            yield guest, gateway
            guest.shutdown()


@pytest.fixture
def machine(booted: tuple[Guest, GatewayProcess], chance: random.Random) -> Machine:
    return Machine(*booted, chance)


@ROUNDS
def test_fio_verifies_across_kills(machine: Machine, rounds: int) -> None:
    with machine.working(fio_command(VERIFIED)):
        for _ in range(rounds):
            machine.kill_gateway()
    machine.has_no_complaints()


@ROUNDS
def test_fio_verifies_across_upgrades(machine: Machine, rounds: int) -> None:
    connected = machine.gateway.log().count("frontend connected")
    with machine.working(fio_command(VERIFIED)):
        for _ in range(rounds):
            machine.gateway.upgrade()
            machine.gateway.wait_for("the guest to go on", _served)
    assert machine.gateway.log().count("frontend connected") == connected
    machine.has_no_complaints()


@ROUNDS
def test_a_filesystem_is_whole_after_each_kill(machine: Machine, rounds: int) -> None:
    guest = machine.guest
    guest.run("mkfs.ext4 -q -F /dev/vda && mkdir -p /mnt && dd if=/dev/urandom of=/tmp/source bs=1M count=8")
    # What is compared comes from the disk, not from the guest's cache.
    forget = "sync && echo 3 >/proc/sys/vm/drop_caches"
    for number in range(rounds):
        guest.run("mount /dev/vda /mnt")
        with machine.working(
            f"cp /tmp/source /mnt/new && {forget} && cmp /tmp/source /mnt/new && rm /mnt/new"
        ):
            guest.run(f"cp /tmp/source /mnt/kept-{number} && sync")
            machine.kill_gateway()
        guest.run("umount /mnt && fsck.ext4 -f -n /dev/vda")
    guest.run("mount /dev/vda /mnt")
    for number in range(rounds):
        guest.run(f"cmp /tmp/source /mnt/kept-{number}")
    guest.run("umount /mnt")
    machine.has_no_complaints()
