"""A running guest moves from one host to another with its volume of a Ceph cluster, and its programs do not notice."""

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from ringstone.client import RemoteClient
from ringstone.errors import BusyError
from ringstone.hypervisor.args import Disk
from ringstone.hypervisor.disks import MovedDisks
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.migration import MigrationError, migrate_vm
from ringstone.hypervisor.qemu import Qemu, QemuConfig
from ringstone.hypervisor.qmp import QmpSession
from ringstone.lab.lab import Lab
from tests.framework.gateway import RINGSTONE
from tests.framework.guest import GuestHost
from tests.framework.lab import wait_for
from tests.framework.load import script
from tests.framework.pattern import running_pattern

MIB = 1 << 20
# See tests/interop/test_migration.py on machines and CPUs.
MACHINE = "pc-q35-7.2"
CPU = "qemu64"
# In the guest /dev/vda and /dev/vdb.
VOLUMES = ("disk", "log")


@dataclass
class Move:
    """A guest on host a, and the QEMU on host b that it is to move to."""

    lab: Lab
    manager: RemoteClient
    config: QemuConfig
    guest: Guest
    folder: Path
    destinations: list[Qemu] = field(default_factory=list)

    def open_destination(self) -> AbstractContextManager[QmpSession]:
        sockets = self.lab.hosts["b"].run_dir / "vhost"
        disks = [Disk(str(sockets / f"{volume}.sock"), volume, queues=1) for volume in VOLUMES]
        folder = self.folder / f"destination-{len(self.destinations)}"
        incoming = replace(self.config, folder=folder, incoming="defer", disks=disks)
        self.destinations.append(Qemu(incoming))
        return nullcontext(self.destinations[-1].qmp)

    def go(self) -> None:
        left = migrate_vm(
            MovedDisks(self.manager, VOLUMES, "b"),
            source=self.guest.qemu.qmp,
            open_destination=self.open_destination,
            uri=f"unix:{self.folder}/move-{len(self.destinations)}.sock",
        )
        assert left == []


@pytest.fixture
def move(lab: Lab, manager: RemoteClient, guest_host: GuestHost, tmp_path: Path) -> Iterator[Move]:
    disks = []
    for volume in VOLUMES:
        manager.create_volume(volume, pool="ceph", size=64 * MIB)
        attachment = manager.attach(volume, host="a", queues=1, ha=True)
        disks.append(Disk(attachment.socket, volume, queues=1))
    config = QemuConfig(
        guest_host.image,
        guest_host.accelerator.name,
        tmp_path / "source",
        disks,
        machine=MACHINE,
        cpu=CPU,
        cpus=2,
        memory_bytes=256 * MIB,
    )
    with Guest(config) as guest:
        source = guest.qemu
        made = Move(lab, manager, config, guest, tmp_path)
        try:
            yield made
        finally:
            source.stop()
            for destination in made.destinations:
                destination.stop()


@contextmanager
def working(move: Move) -> Iterator[None]:
    """fio writes and verifies both disks all the time, and sees no error."""
    job = FioJob("move", "randwrite", engine="libaio", depth=8, size=16 * MIB, verify="write")
    running = [
        move.guest.start(
            fio_command(replace(job, filename=disk, extra=("--loops=2", "--rate_iops=1000,1000")))
        )
        for disk in ("/dev/vda", "/dev/vdb")
    ]
    yield
    for one in running:
        result = parse_fio(one.wait(timeout_s=240).stdout)
        assert result.errors == 0
        assert result.write.operations == 2 * 16 * MIB // 4096
    assert move.guest.output("dmesg | grep -i 'I/O error' || true") == ""


def test_a_guest_moves_to_another_host_with_its_disks_under_load(move: Move) -> None:
    before = {volume: move.manager.attachment(volume) for volume in VOLUMES}
    shut_out = set(move.lab.ceph.blocklist())
    with working(move):
        # A destination that is not the guest's: it stays where it is.
        with pytest.raises(MigrationError, match="volume disk is host a's as before"):
            replace(move, config=replace(move.config, memory_bytes=128 * MIB)).go()
        wait_for("the guest's disk at a", lambda: move.manager.attachment("disk").state == "running")
        move.go()
        move.guest.moved_to(move.destinations[-1])
    for volume in VOLUMES:
        now = move.manager.attachment(volume)
        assert (now.host, now.state, now.ha) == ("b", "running", True)
        assert now.epoch == before[volume].epoch + 1
        assert now.peer_pid == move.destinations[-1].pid
        with move.lab.hosts["b"].client() as at_b:
            # The load was not over when it moved.
            assert (
                sum(queue.reads + queue.writes for queue in at_b.stats(volume=volume).of_volume(volume)) > 100
            )
    # Each host let go by itself.
    assert set(move.lab.ceph.blocklist()) == shut_out
    move.guest.shutdown()


def test_a_host_that_waits_for_a_guest_owns_nothing(lab: Lab, manager: RemoteClient) -> None:
    manager.create_volume("disk", pool="ceph", size=64 * MIB)
    before = manager.attach("disk", host="a")
    waiting = manager.attach("disk", host="b", incoming=True)
    assert (waiting.host, waiting.state) == ("b", "listening")
    with lab.hosts["b"].client() as at_b:
        assert at_b.attachment("disk").state == "incoming"
    assert manager.attachment("disk") == before
    # A new process could not tell whose the image is.
    refused = subprocess.run(
        [*RINGSTONE, "--socket", str(lab.hosts["b"].socket), "gateway", "upgrade"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert refused.returncode != 0
    assert "waits for its guest from another host" in refused.stderr
    assert manager.attachment("disk") == before
    assert script(before.socket, [{"op": "write", "offset": 0, "len": 4096, "fill": {"seed": 1}}])
    # Its guest runs.
    with (
        running_pattern(before.socket, queues=1, wait="sleep") as load,
        pytest.raises(BusyError, match="stop its guest"),
    ):
        manager.release("disk")
    assert load.report.passed, load.report.findings
    # Its guest stands still. Nobody has it until somebody owns it again, which may be who had it.
    manager.release("disk")
    assert manager.attach("disk", host="a", take_over=True).epoch == before.epoch
    assert script(before.socket, [{"op": "read", "offset": 0, "len": 4096}])
    manager.detach("disk", host="b")
    assert not Path(waiting.socket).exists()
    assert manager.attachment("disk") == before
