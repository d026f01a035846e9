"""A running guest moves from one QEMU to a newer one, and its programs do not notice."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone import models
from ringstone.errors import RingstoneError
from ringstone.hypervisor import args, migration
from ringstone.hypervisor.args import volume_args
from ringstone.hypervisor.disks import SharedDisks
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.migration import MigrationError
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
MOVES_OF_MEMORY = 3


@pytest.fixture
def config(guest_host: GuestHost, tmp_path: Path) -> QemuConfig:
    assert QEMU_NEXT.exists(), "the newer QEMU is missing; run `make qemu-next`"
    return QemuConfig(
        guest_host.image,
        guest_host.accelerator.name,
        tmp_path / "source",
        machine=MACHINE,
        cpu=CPU,
        cpus=2,
        memory_bytes=256 * MIB,
    )


@contextmanager
def waiting(config: QemuConfig, folder: Path) -> Iterator[Qemu]:
    """The destination: a newer QEMU that waits for the guest of `config`."""
    with Qemu(replace(config, folder=folder, program=QEMU_NEXT, incoming="defer")) as destination:
        yield destination


def move_without_disks(guest: Guest, destination: Qemu, meeting: Path) -> list[str]:
    return migration.migrate_vm(
        SharedDisks(NoVolumes(), []),
        source=guest.qemu.qmp,
        open_destination=lambda: nullcontext(destination.qmp),
        uri=f"unix:{meeting}",
    )


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


def test_memory_that_a_guest_writes_meanwhile_arrives(
    config: QemuConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the two pages that an emulated guest has more, it crashes at QEMU 7.2's first or second move."""

    def slowly(qmp: QmpSession, uri: str) -> None:
        # So that it takes several rounds, in which the guest writes.
        begin(qmp, uri, bytes_per_second=150 * MIB, downtime_ms=20)

    begin = migration.start
    monkeypatch.setattr(migration, "start", slowly)
    with ExitStack() as stack:
        guest = stack.enter_context(Guest(config))
        stack.callback(guest.qemu.stop)
        for number in range(config.cpus):
            file = f"/{number}.dat"
            job = FioJob(
                "memory",
                "randwrite",
                engine="mmap",
                size=8 * MIB,
                filename=file,
                direct=False,
                verify="write",
            )
            guest.start(
                f"while {fio_command(job)} >/{number}.out 2>&1; do echo >>/passed; done; touch /failed"
            )
        for move in range(MOVES_OF_MEMORY):
            folder = tmp_path / f"destination-{move}"
            destination = stack.enter_context(Qemu(replace(config, folder=folder, incoming="defer")))
            assert move_without_disks(guest, destination, tmp_path / f"{move}.sock") == []
            guest.moved_to(destination)
            guest.run(
                "touch /passed; wanted=$(($(wc -l </passed) + 4)); "
                "until [ $(wc -l </passed) -ge $wanted ] || [ -e /failed ]; do usleep 100000; done"
            )
            assert guest.output("[ ! -e /failed ] || cat /*.out") == ""
        guest.shutdown()


def test_a_guest_whose_memory_would_not_arrive_is_refused(
    config: QemuConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config.accelerator != "tcg":
        pytest.skip("KVM follows a guest's memory in every version of QEMU")
    monkeypatch.setattr(args, "EMULATED_EXTRA", 0)
    with Guest(config) as guest, waiting(config, tmp_path / "destination") as destination:
        with pytest.raises(MigrationError, match=r"QEMU 7\.2 loses memory .* nothing had been changed"):
            move_without_disks(guest, destination, tmp_path / "move.sock")
        assert migration.run_state(guest.qemu.qmp) == "running"


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
