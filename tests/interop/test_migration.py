"""A running guest moves from one QEMU to a newer one, and its programs do not notice."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone import models
from ringstone.errors import RingstoneError
from ringstone.hypervisor import args, migration
from ringstone.hypervisor.args import Disk
from ringstone.hypervisor.disks import SharedDisks
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.migration import MigrationError
from ringstone.hypervisor.qemu import Qemu, QemuConfig
from ringstone.hypervisor.qmp import QmpSession
from ringstone.models import Faults, PoolCreate
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost
from tests.framework.qemus import program

MIB = 1 << 20
# Versions of QEMU agree on a machine and a CPU only where these are named.
MACHINE = "pc-q35-7.2"
CPU = "qemu64"
MOVES_OF_MEMORY = 3


@pytest.fixture
def config(guest_host: GuestHost, tmp_path: Path) -> QemuConfig:
    return QemuConfig(
        guest_host.image,
        guest_host.accelerator.name,
        tmp_path / "source",
        program=program("7.2"),
        machine=MACHINE,
        cpu=CPU,
        cpus=2,
        memory_bytes=256 * MIB,
    )


@contextmanager
def waiting(config: QemuConfig, folder: Path) -> Iterator[Qemu]:
    """The destination: a newer QEMU that waits for the guest of `config`."""
    with Qemu(replace(config, folder=folder, program=program("10.0"), incoming="defer")) as destination:
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


def move_with_disk(
    gateway: GatewayProcess, guest: Guest, config: QemuConfig, folder: Path, stack: ExitStack
) -> Qemu:
    """Move a guest whose disk is the volume `v` to a QEMU of `config`. Both are gone when `stack` ends."""
    source = guest.qemu
    destinations: list[Qemu] = []

    def start_destination() -> AbstractContextManager[QmpSession]:
        destinations.append(stack.enter_context(Qemu(replace(config, folder=folder, incoming="defer"))))
        return nullcontext(destinations[0].qmp)

    stack.callback(source.stop)
    with gateway.client() as client:
        left = migration.migrate_vm(
            SharedDisks(client, ["v"]),
            source=source.qmp,
            open_destination=start_destination,
            uri=f"unix:{folder}.sock",
        )
        assert left == []
        guest.moved_to(destinations[0])
        return destinations[0]


def is_served(gateway: GatewayProcess, destination: Qemu) -> None:
    with gateway.client() as client:
        now = client.attachment("v")
    assert (now.state, now.shared, now.frontends) == ("running", False, 1)
    assert now.peer_pid == destination.pid


@pytest.mark.parametrize(
    ("source", "destination", "machine"), [("7.2", "10.0", "pc-q35-7.2"), ("10.0", "11.1", "pc-q35-10.0")]
)
def test_a_disk_under_load_moves_with_its_guest(
    config: QemuConfig, tmp_path: Path, source: str, destination: str, machine: str
) -> None:
    with GatewayProcess() as gateway, ExitStack() as stack:
        attachment = gateway.start().serve("v", kind="file", size=64 * MIB, queues=2)
        # 11.1 takes rings of 10.0 only where it has as many entries, and no virtio-serial at all.
        disk = Disk(attachment.socket, "v", queues=2, queue_size=1024 if source == "10.0" else None)
        config = replace(config, disks=[disk], machine=machine, program=program(source))
        config = replace(config, serial_agent=source == "10.0")
        guest = stack.enter_context(Guest(config))
        job = FioJob("move", "randwrite", engine="io_uring", depth=16, size=32 * MIB, verify="write")
        working = guest.start(fio_command(replace(job, extra=("--loops=6",))))
        newer = replace(config, program=program(destination))
        moved = move_with_disk(gateway, guest, newer, tmp_path / "destination", stack)
        result = parse_fio(working.wait(timeout_s=600).stdout)
        assert result.errors == 0
        assert result.write.operations == 6 * 32 * MIB // 4096
        assert guest.output("dmesg | grep -i 'I/O error' || true") == ""
        is_served(gateway, moved)
        guest.shutdown()


def test_requests_in_flight_move_along(config: QemuConfig, tmp_path: Path) -> None:
    """QEMU takes the in-flight region with the guest, and what the drive had not begun at the source is done at the
    destination."""
    with GatewayProcess(test_pools=True) as gateway, ExitStack() as stack:
        slow = PoolCreate(
            name="slow", type="faulty", path=str(gateway.memory / "slow"), faults=Faults(delay_us=50_000)
        )
        with gateway.start().client() as client:
            client.create_pool(slow)
        attachment = gateway.serve("v", kind="slow", size=32 * MIB, queues=1)
        disks = [Disk(attachment.socket, "v", queues=1, inflight_migration=True)]
        config = replace(config, disks=disks, program=program("11.1"), machine="pc-q35-11.1")
        guest = stack.enter_context(Guest(config))
        job = FioJob("slow", "randwrite", engine="io_uring", depth=64, size=16 * MIB, verify="write")
        working = guest.start(fio_command(job))
        gateway.wait_for(
            "the guest to write", lambda client: client.stats(volume="v").of_volume("v")[0].writes > 100
        )
        moved = move_with_disk(gateway, guest, config, tmp_path / "destination", stack)
        assert parse_fio(working.wait(timeout_s=600).stdout).errors == 0
        assert "had not finished are done again" in gateway.log()
        is_served(gateway, moved)
        guest.shutdown()


def test_a_guest_that_the_destination_cannot_take_goes_on_at_the_source(
    config: QemuConfig, tmp_path: Path
) -> None:
    """QEMU 11.1 finds a ring of 10.0's virtio-serial too large when all memory is there already."""
    with GatewayProcess() as gateway, ExitStack() as stack:
        attachment = gateway.start().serve("v", kind="file", size=64 * MIB, queues=2)
        disks = [Disk(attachment.socket, "v", queues=2)]
        config = replace(config, disks=disks, machine="pc-q35-10.0", program=program("10.0"))
        guest = stack.enter_context(Guest(config))
        job = FioJob("stay", "randwrite", engine="io_uring", depth=16, size=16 * MIB, verify="write")
        working = guest.start(fio_command(replace(job, extra=("--loops=4",))))
        newer = replace(config, program=program("11.1"))
        source = guest.qemu
        with pytest.raises(MigrationError, match=r"Rolled back: .*the source (was resumed|runs on)"):
            move_with_disk(gateway, guest, newer, tmp_path / "destination", stack)
        assert parse_fio(working.wait(timeout_s=600).stdout).errors == 0
        with gateway.client() as client:
            now = client.attachment("v")
        assert (now.state, now.shared, now.frontends) == ("running", False, 1)
        assert source.running()
        guest.shutdown()


def test_a_qemu_that_replaces_itself_keeps_its_disk(config: QemuConfig, tmp_path: Path) -> None:
    """CPR: QEMU hands the guest's memory to a new program in the same process, which connects to the gateway anew."""
    monitor, state = tmp_path / "qmp.sock", tmp_path / "state"
    with GatewayProcess() as gateway:
        attachment = gateway.start().serve("v", kind="file", size=64 * MIB, queues=2)
        config = replace(
            config,
            disks=[Disk(attachment.socket, "v", queues=2)],
            devices=["-qmp", f"unix:{monitor},server=on,wait=off"],
            program=program("11.1"),
            machine="pc-q35-11.1,aux-ram-share=on",
        )
        with Guest(config) as guest:
            job = FioJob("stay", "randwrite", engine="io_uring", depth=16, size=16 * MIB, verify="write")
            working = guest.start(fio_command(job))
            gateway.wait_for(
                "the guest to write", lambda client: client.stats(volume="v").of_volume("v")[0].writes > 50
            )
            # The same words again, in the root where this QEMU runs already.
            words = Path(f"/proc/{guest.qemu.pid}/cmdline").read_text().split("\0")[1:-1]
            anew = ["/usr/bin/qemu-system-x86_64", *words, "-incoming", f"file:{state}"]
            with QmpSession.open(monitor) as qmp:
                qmp.execute("migrate-set-parameters", {"mode": "cpr-exec", "cpr-exec-command": anew})
                qmp.execute("migrate", {"uri": f"file:{state}"})
            assert parse_fio(working.wait(timeout_s=120).stdout).errors == 0
            assert "-incoming" in Path(f"/proc/{guest.qemu.pid}/cmdline").read_text().split("\0")
            assert gateway.log().count("volume v: frontend connected") == 2
            assert guest.output("dmesg | grep -i 'I/O error' || true") == ""
