"""A running guest moves from one QEMU to a newer one, and its programs do not notice."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone import models
from ringstone.errors import RingstoneError
from ringstone.hypervisor import migration
from ringstone.hypervisor.args import volume_args
from ringstone.hypervisor.disks import SharedDisks
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.qemu import Qemu, QemuConfig
from ringstone.hypervisor.qmp import QmpSession
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost

MIB = 1 << 20
# scripts/qemu-next puts it there; `make test` runs that first.
QEMU_NEXT = Path(__file__).resolve().parents[2] / ".cache/qemu-next/qemu-system-x86_64"
# Versions of QEMU agree on a machine and a CPU only where these are named.
MACHINE = "pc-q35-7.2"
CPU = "qemu64"


@pytest.fixture
def config(guest_host: GuestHost, tmp_path: Path) -> QemuConfig:
    assert QEMU_NEXT.exists(), "the newer QEMU is missing; run `make qemu-next`"
    return QemuConfig(
        guest_host.image,
        guest_host.accelerator.name,
        tmp_path / "source",
        machine=MACHINE,
        cpu=CPU,
        # With two, emulated guests now and then crashed after a migration, from 7.2 to 7.2 as well (1 of 5) and
        # without a volume; with one, after none of 17. The reason in QEMU is not known.
        cpus=1,
        memory_bytes=256 * MIB,
    )


@contextmanager
def waiting(config: QemuConfig, folder: Path) -> Iterator[Qemu]:
    """The destination: a newer QEMU that waits for the guest of `config`."""
    with Qemu(replace(config, folder=folder, program=QEMU_NEXT, incoming="defer")) as destination:
        yield destination


class NoVolumes:
    """A gateway that is never asked."""

    def share(self, volume: str, shared: bool) -> models.Attachment:
        raise AssertionError(volume)


def test_a_guest_moves_to_a_newer_qemu_and_goes_on(config: QemuConfig, tmp_path: Path) -> None:
    with Guest(config) as guest, waiting(config, tmp_path / "destination") as destination:
        source = guest.qemu
        counting = guest.start("for n in $(seq 300); do echo $n; usleep 10000; done")
        boot_id = guest.output("cat /proc/sys/kernel/random/boot_id")
        steps: list[str] = []
        left = migration.migrate_vm(
            SharedDisks(NoVolumes(), []),
            source=source.qmp,
            open_destination=lambda: nullcontext(destination.qmp),
            uri=f"unix:{tmp_path}/move.sock",
            report=steps.append,
        )
        assert left == []
        assert steps[-2:] == ["The guest runs at the destination.", "The source's QEMU was ended."]
        assert source.wait(30) == 0
        guest.moved_to(destination)
        assert counting.wait().stdout.split() == [str(n) for n in range(1, 301)]
        assert guest.output("cat /proc/sys/kernel/random/boot_id") == boot_id == guest.boot_id
        guest.run("echo moved >/dev/console")
        assert "moved" in destination.console_log.read_text()
        assert "moved" not in source.console_log.read_text()
        guest.shutdown()
        source.stop()


def test_a_migration_that_fails_leaves_the_guest_where_it_was(config: QemuConfig, tmp_path: Path) -> None:
    """The destination has less memory than the guest."""
    monitor = tmp_path / "qmp.sock"
    extra = ("-qmp", f"unix:{monitor},server=on,wait=off")
    smaller = replace(config, memory_bytes=128 * MIB, devices=extra)
    with Guest(config) as guest, waiting(smaller, tmp_path / "destination") as destination:
        with pytest.raises(RingstoneError, match="Rolled back: the migration was stopped") as failure:
            migration.migrate_vm(
                SharedDisks(NoVolumes(), []),
                source=guest.qemu.qmp,
                open_destination=lambda: QmpSession.open(monitor),
                uri=f"unix:{tmp_path}/move.sock",
            )
        assert "the destination's QEMU was ended" in str(failure.value)
        destination.wait(30)
        assert guest.output("echo here") == "here"
        guest.shutdown()


def test_a_disk_under_load_moves_with_its_guest(config: QemuConfig, tmp_path: Path) -> None:
    with GatewayProcess() as gateway, gateway.start().client() as client:
        attachment = gateway.serve("v", kind="file", size=64 * MIB, queues=2)
        disk = volume_args(attachment.socket, volume="v", queues=2)
        config = replace(config, devices=disk)
        with Guest(config) as guest:
            source = guest.qemu
            job = FioJob("move", "randwrite", engine="io_uring", depth=16, size=48 * MIB, verify="write")
            working = guest.start(fio_command(replace(job, extra=("--loops=8",))))
            destinations: list[Qemu] = []

            def start_destination() -> AbstractContextManager[QmpSession]:
                incoming = replace(
                    config,
                    folder=tmp_path / "destination",
                    program=QEMU_NEXT,
                    incoming="defer",
                )
                destinations.append(Qemu(incoming))
                return nullcontext(destinations[0].qmp)

            try:
                left = migration.migrate_vm(
                    SharedDisks(client, ["v"]),
                    source=source.qmp,
                    open_destination=start_destination,
                    uri=f"unix:{tmp_path}/move.sock",
                )
                guest.moved_to(destinations[0])
                result = parse_fio(working.wait(timeout_s=600).stdout)
                assert result.errors == 0
                assert result.write.operations == 8 * 48 * MIB // 4096
                assert guest.output("dmesg | grep -i 'I/O error' || true") == ""
                assert left == []
                now = client.attachment("v")
                assert (now.state, now.shared, now.frontends) == ("running", False, 1)
                assert now.peer_pid == destinations[0].pid
                guest.shutdown()
            finally:
                source.stop()
                for destination in destinations:
                    destination.stop()
