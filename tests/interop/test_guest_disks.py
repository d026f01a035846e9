"""One guest, five disks: what a Linux guest sees of volumes with different queues, blocks and rights."""

import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ringstone.hypervisor.fio import FioJob
from ringstone.hypervisor.guest import CommandFailed, Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost, backing_of, disk_of

MIB = 1 << 20
SIZE = 64 * MIB
CPUS = 4
QUEUES = {"one-queue": 1, "two-queues": 2, "four-queues": 4}
BLOCK_SIZES = {"one-queue": 512, "two-queues": 512, "four-queues": 4096}
WRITABLE = list(QUEUES)


@dataclass(frozen=True)
class Machine:
    """A running guest, the gateway of its disks, and what the read-only disk holds."""

    guest: Guest
    gateway: GatewayProcess
    read_only_sha256: str

    def disk(self, volume: str) -> str:
        disk = disk_of(self.guest, self.gateway, volume)
        assert disk is not None, f"no disk of the guest has the serial number of {volume}"
        return disk

    def path(self, volume: str) -> str:
        return f"/dev/{self.disk(volume)}"

    def sysfs(self, volume: str, attribute: str) -> str:
        return self.guest.output(f"cat /sys/block/{self.disk(volume)}/{attribute}")

    def allocated(self, volume: str) -> int:
        with self.gateway.client() as client:
            allocated = client.volume(volume).allocated
        assert allocated is not None
        return allocated


@pytest.fixture(scope="module", params=["file", "memory"])
def machine(request: pytest.FixtureRequest, guest_host: GuestHost) -> Iterator[Machine]:
    kind = request.param
    with GatewayProcess() as gateway:
        gateway.start()
        for volume in WRITABLE:
            gateway.serve(volume, kind=kind, size=SIZE, block_size=BLOCK_SIZES[volume], queues=QUEUES[volume])
        with gateway.client() as client:
            client.create_volume("read-only", pool=kind, size=SIZE)
            sha256 = _fill(backing_of(gateway, "read-only"))
            client.attach("read-only", read_only=True)
        with guest_host.boot(gateway, *WRITABLE, "read-only", cpus=CPUS) as guest:
            yield Machine(guest, gateway, sha256)
            guest.shutdown()
        with gateway.client() as client:
            for attachment in client.attachments():
                client.detach(attachment.volume)
            assert client.attachments() == []


def _fill(path: Path) -> str:
    """Put known content into a backing file from the host's side, while nobody serves it."""
    content = random.Random(1).randbytes(SIZE)
    with path.open("r+b") as backing:
        backing.write(content)
        os.fsync(backing.fileno())
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("volume", [*WRITABLE, "read-only"])
def test_the_disk_is_found_by_its_serial_and_has_the_size(machine: Machine, volume: str) -> None:
    assert machine.guest.output(f"blockdev --getsize64 {machine.path(volume)}") == str(SIZE)


@pytest.mark.parametrize("volume", WRITABLE)
def test_the_blocks_have_the_volumes_size(machine: Machine, volume: str) -> None:
    block_size = BLOCK_SIZES[volume]
    assert machine.sysfs(volume, "queue/logical_block_size") == str(block_size)
    block = FioJob("block", "write", size=block_size, block_size=block_size, filename=machine.path(volume))
    assert machine.guest.fio(block).write.operations == 1
    if block_size > 512:
        half = replace(block, block_size=block_size // 2)
        with pytest.raises(CommandFailed, match="Invalid argument"):
            machine.guest.fio(half)


@pytest.mark.parametrize("volume", WRITABLE)
def test_the_guest_uses_every_queue(machine: Machine, volume: str) -> None:
    queues = QUEUES[volume]
    assert len(machine.guest.output(f"ls /sys/block/{machine.disk(volume)}/mq").split()) == queues
    machine.guest.fio(
        FioJob(
            "queues",
            "randread",
            jobs=CPUS,
            size=MIB,
            filename=machine.path(volume),
            extra=(f"--cpus_allowed=0-{CPUS - 1}", "--cpus_allowed_policy=split"),
        )
    )
    with machine.gateway.client() as client:
        counted = client.stats(volume=volume).of_volume(volume)
    assert [queue.index for queue in counted] == list(range(queues))
    assert all(queue.reads >= MIB // 4096 for queue in counted)
    assert all(queue.errors == 0 for queue in counted)


@pytest.mark.parametrize("volume", WRITABLE)
@pytest.mark.parametrize(("engine", "depth"), [("psync", 1), ("io_uring", 64)])
def test_what_is_written_is_read_back(machine: Machine, volume: str, engine: str, depth: int) -> None:
    # Requests of many lengths: one segment and many, within a page and over several.
    lengths = f"--bsrange={BLOCK_SIZES[volume]}-256k"
    job = FioJob(
        "verify",
        "randwrite",
        engine=engine,
        depth=depth,
        size=8 * MIB,
        filename=machine.path(volume),
        verify="write",
        extra=(lengths, "--bs_unaligned=0"),
    )
    result = machine.guest.fio(job)
    assert result.write.operations == result.read.operations > 8 * MIB // (256 << 10)


def test_a_read_only_disk_is_read_and_not_written(machine: Machine) -> None:
    guest, path = machine.guest, machine.path("read-only")
    assert machine.sysfs("read-only", "ro") == "1"
    assert guest.output(f"sha256sum {path}").split()[0] == machine.read_only_sha256
    refused = guest.run(f"dd if=/dev/zero of={path} bs=4096 count=1 oflag=direct", check=False)
    assert refused.exit_code != 0
    assert guest.run(f"mkfs.ext4 -q {path}", check=False).exit_code != 0
    content = backing_of(machine.gateway, "read-only").read_bytes()
    assert hashlib.sha256(content).hexdigest() == machine.read_only_sha256


@pytest.mark.parametrize("volume", WRITABLE)
@pytest.mark.parametrize("command", ["blkdiscard", "blkdiscard --zeroout"])
def test_discarded_and_zeroed_blocks_read_as_zeroes(machine: Machine, volume: str, command: str) -> None:
    guest, path = machine.guest, machine.path(volume)
    guest.run(f"dd if=/dev/urandom of={path} bs=1M count=4 oflag=direct")
    guest.run(f"{command} --offset 1M --length 2M {path}")
    zeroes = hashlib.sha256(bytes(2 * MIB)).hexdigest()
    read = f"dd if={path} bs=1M iflag=direct"
    assert guest.output(f"{read} skip=1 count=2 | sha256sum").split()[0] == zeroes
    # The blocks on both sides keep what they had.
    assert guest.output(f"{read} skip=0 count=1 | tr -d '\\000' | wc -c") != "0"
    assert guest.output(f"{read} skip=3 count=1 | tr -d '\\000' | wc -c") != "0"


@pytest.mark.parametrize("volume", WRITABLE)
def test_discarded_blocks_are_given_back_to_the_host(machine: Machine, volume: str) -> None:
    guest, path = machine.guest, machine.path(volume)
    guest.run(f"dd if=/dev/urandom of={path} bs=1M count=8 oflag=direct; sync")
    written = machine.allocated(volume)
    assert written >= 8 * MIB
    guest.run(f"blkdiscard --length 8M {path}")
    assert written - machine.allocated(volume) >= 7 * MIB
