"""A filesystem's life on a volume: made, filled, grown while mounted, trimmed, and checked after a reboot."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ringstone.hypervisor.guest import Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost, wait_until

MIB = 1 << 20
SIZE = 128 * MIB
GROWN = 256 * MIB
FILES = 24


@dataclass(frozen=True)
class Machine:
    """A running guest with one volume, `disk`, and its gateway."""

    guest: Guest
    gateway: GatewayProcess

    def allocated(self) -> int:
        with self.gateway.client() as client:
            allocated = client.volume("disk").allocated
        assert allocated is not None
        return allocated


@pytest.fixture(
    params=[("file", 512), ("file", 4096), ("memory", 512)], ids=lambda param: f"{param[0]}-{param[1]}"
)
def machine(request: pytest.FixtureRequest, guest_host: GuestHost) -> Iterator[Machine]:
    kind, block_size = request.param
    with GatewayProcess() as gateway:
        gateway.start()
        gateway.serve("disk", kind=kind, size=SIZE, block_size=block_size, queues=2)
        with guest_host.boot(gateway, "disk") as guest:
            yield Machine(guest, gateway)
            guest.shutdown()


def _checksums(guest: Guest) -> str:
    return guest.output("cd /mnt && find . -type f | sort | xargs sha256sum")


def test_a_filesystem_lives_through_growth_trim_and_reboot(machine: Machine) -> None:
    guest = machine.guest
    guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && mkdir /mnt/deep")
    fill = "dd if=/dev/urandom of=/mnt/deep/$n bs=64k count=$((n * 2 + 1))"
    guest.run(f"for n in $(seq {FILES}); do {fill}; done; sync")
    before = _checksums(guest)
    assert len(before.splitlines()) == FILES

    # Growth while mounted: the guest sees it without a reboot.
    with machine.gateway.client() as client:
        client.resize_volume("disk", GROWN)
    wait_until(
        lambda: guest.output("blockdev --getsize64 /dev/vda") == str(GROWN), "the guest sees the new size"
    )
    guest.run("resize2fs /dev/vda")
    blocks = int(guest.output("df -P -k /mnt | tail -1 | awk '{print $2}'"))
    assert blocks * 1024 > SIZE
    # The new end of the disk is really there.
    guest.run("dd if=/dev/zero of=/mnt/large bs=1M count=100 && sync")
    assert _checksums(guest).startswith(before.splitlines()[0])

    # Trim gives the host its blocks back.
    full = machine.allocated()
    guest.run("rm /mnt/large && sync && fstrim /mnt")
    assert full - machine.allocated() >= 90 * MIB

    assert _checksums(guest) == before
    guest.reboot()
    guest.run("fsck.ext4 -f -n /dev/vda")
    assert guest.output("blockdev --getsize64 /dev/vda") == str(GROWN)
    guest.run("mount /dev/vda /mnt")
    assert _checksums(guest) == before
    assert guest.output("dmesg | grep -i -e 'I/O error' -e 'EXT4-fs error' || true") == ""


def test_a_filesystem_outlives_a_power_failure(guest_host: GuestHost) -> None:
    with GatewayProcess() as gateway:
        gateway.start()
        gateway.serve("disk", kind="file", size=SIZE, queues=2)
        with guest_host.boot(gateway, "disk") as guest:
            guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
            guest.run("dd if=/dev/urandom of=/mnt/synced bs=1M count=16 conv=fsync && sync")
            before = _checksums(guest)
            guest.start("dd if=/dev/urandom of=/mnt/lost bs=64k count=512")
            guest.stop()
        with gateway.client() as client:
            wait_until(lambda: client.attachment("disk").peer_pid is None, "the frontend is gone")
            assert client.attachment("disk").state == "listening"
        with guest_host.boot(gateway, "disk") as guest:
            guest.run("mount /dev/vda /mnt && rm -f /mnt/lost && sync")
            assert _checksums(guest) == before
            guest.run("umount /mnt && fsck.ext4 -f -n /dev/vda")
            guest.shutdown()
