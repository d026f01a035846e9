"""A real libvirtd, whose QEMU is a user of its own, with the XML that `ringstone libvirt-xml` prints: of Debian 13, and
in the long form of Debian 12 and of Debian 13's backports too."""

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ringstone.hypervisor import args
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Command, Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost, disk_of, wait_until
from tests.framework.libvirt import (
    QEMU_GROUP,
    QEMU_USER,
    SUITES,
    DomainGuest,
    Libvirtd,
    LibvirtError,
    libvirt_root,
)

MIB = 1 << 20
SHORT = "trixie"
SCHEMA = "/usr/share/libvirt/schemas/domain.rng"
# Where QEMU is too old to leave nothing of an emulated guest's memory behind: 7.2 (docs/operations/migration.md).
LEAVES_MEMORY_BEHIND = "bookworm"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="libvirtd in namespaces of its own takes root, as its QEMU is another user."
)


@pytest.fixture(
    scope="module",
    params=[suite if suite == SHORT else pytest.param(suite, marks=pytest.mark.soak) for suite in SUITES],
)
def suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        libvirt_root(name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"libvirt of {name} cannot be unpacked: {error}")
    return name


@pytest.fixture
def gateway() -> Iterator[GatewayProcess]:
    """As for a host with libvirt."""
    rights = ("--socket-owner", str(QEMU_USER), "--socket-group", str(QEMU_GROUP), "--socket-mode", "0600")
    with GatewayProcess(*rights) as gateway:
        # QEMU's user goes through it.
        gateway.root.chmod(0o711)
        yield gateway.start()


Start = Callable[[], Libvirtd]


@pytest.fixture
def libvirtd(suite: str, gateway: GatewayProcess, guest_host: GuestHost) -> Iterator[Start]:
    """Starts one more of them at each call; all have ended before the gateway does."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def start() -> Libvirtd:
            host = f"host-{next(numbers)}"
            folder = gateway.root / host
            folder.mkdir()
            return stack.enter_context(Libvirtd(f"libvirt-{suite}", folder, guest_host.image, host=host))

        yield start


def printed(gateway: GatewayProcess, *more: str) -> str:
    return gateway.cli("libvirt-xml", "v", "--memory", "512M", "--domain-type", "qemu", *more).stdout


def working(guest: Guest, disk: str = "vda") -> Command:
    """Writes of which every one is read back; five seconds at least."""
    job = FioJob("w", "randwrite", size=32 * MIB, depth=8, filename=f"/dev/{disk}", verify="write", seconds=5)
    return guest.start(fio_command(job))


def sound(work: Command, guest: Guest) -> None:
    result = parse_fio(work.wait(timeout_s=120).stdout)
    assert (result.errors, result.write.operations > 0) == (0, True)
    assert guest.output("dmesg | grep -i 'I/O error' || true") == ""


def test_what_is_printed_is_valid(suite: str, tmp_path: Path) -> None:
    """To libvirt's own schema, in every form."""
    path = tmp_path / "domain.xml"
    for hugepages, packed, kind in itertools.product((False, True), (False, True), ("kvm", "qemu")):
        path.write_text(
            args.libvirt_xml(
                "/run/ringstone/vhost/v.sock",
                volume="v",
                queues=4,
                memory_bytes=1 << 30,
                hugepages=hugepages,
                packed=packed,
                domain_type=kind,
            )
        )
        said = subprocess.run(
            ["scripts/in-root", f"libvirt-{suite}", "xmllint", "--noout", "--relaxng", SCHEMA, str(path)],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr


def test_a_domain_of_qemus_own_user_outlives_the_gateway(gateway: GatewayProcess, libvirtd: Start) -> None:
    """Started, with a disk that comes and goes while another one works, over a crash and a hot upgrade."""
    gateway.serve("v", kind="file", queues=2)
    gateway.serve("more", kind="file")
    daemon = libvirtd()
    daemon.virsh("create", daemon.domain(printed(gateway)))
    with DomainGuest(daemon) as guest, gateway.client() as client:
        pid = client.attachment("v").peer_pid
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"Uid:\t{QEMU_USER}\t{QEMU_USER}\t{QEMU_USER}\t{QEMU_USER}" in status
        assert f"Gid:\t{QEMU_GROUP}" in status
        assert disk_of(guest, gateway, "v") == "vda"
        assert guest.output("nproc") == "2"
        work = working(guest)
        disk = daemon.folder / "disk.xml"
        disk.write_text(gateway.cli("libvirt-xml", "more", "--disk", "--target", "vdb").stdout)
        daemon.virsh("attach-device", "guest", str(disk))
        wait_until(lambda: disk_of(guest, gateway, "more") == "vdb", "the guest has the new disk")
        sound(working(guest, "vdb"), guest)
        gateway.kill()
        gateway.start()
        wait_until(lambda: client.attachment("v").state == "running", "QEMU is back")
        gateway.upgrade()
        daemon.virsh("detach-device", "guest", str(disk))
        wait_until(lambda: client.attachment("more").frontends == 0, "QEMU has let go of the disk")
        client.detach("more")
        sound(work, guest)
        # What libvirt has done to the socket is nothing.
        socket = Path(client.attachment("v").socket).stat()
        assert (socket.st_uid, socket.st_gid, socket.st_mode & 0o777) == (QEMU_USER, QEMU_GROUP, 0o600)
        daemon.virsh("destroy", "guest")
        wait_until(lambda: client.attachment("v").state == "listening", "QEMU is gone")
        daemon.virsh("create", daemon.domain(printed(gateway)))
    with DomainGuest(daemon) as guest:
        sound(working(guest), guest)


def test_without_the_right_to_connect_it_is_refused(gateway: GatewayProcess, libvirtd: Start) -> None:
    """As with every socket of a release before, until somebody changed its owner by hand."""
    gateway.serve("other", kind="file")
    with gateway.client() as client:
        client.create_volume("v", pool="file", size=64 * MIB)
        client.attach("v", socket_owner="0", socket_group="0")
    daemon = libvirtd()
    with pytest.raises(LibvirtError, match="Permission denied"):
        daemon.virsh("create", daemon.domain(printed(gateway)))


def test_a_domain_is_saved_and_goes_on_where_it_was(gateway: GatewayProcess, libvirtd: Start) -> None:
    gateway.serve("v", kind="file", queues=2)
    daemon = libvirtd()
    daemon.virsh("create", daemon.domain(printed(gateway)))
    saved = str(daemon.guests / "saved")
    with DomainGuest(daemon) as guest, gateway.client() as client:
        guest.output("mkdir -p /kept && mount -t tmpfs none /kept && echo memory >/kept/file")
        sound(working(guest), guest)
        daemon.virsh("save", "guest", saved)
        wait_until(lambda: client.attachment("v").frontends == 0, "QEMU is gone")
        daemon.virsh("restore", saved)
        guest.goes_on_in(daemon)
        assert guest.output("cat /kept/file") == "memory"
        sound(working(guest), guest)


def test_a_domain_moves_to_another_libvirt_and_back(
    suite: str, gateway: GatewayProcess, libvirtd: Start
) -> None:
    if suite == LEAVES_MEMORY_BEHIND:
        pytest.skip("QEMU 7.2 leaves an emulated guest's memory behind, and libvirt takes whole MiB only.")
    gateway.serve("v", kind="file", queues=2)
    here, there = libvirtd(), libvirtd()
    here.virsh("create", here.domain(printed(gateway)))
    with DomainGuest(here) as guest:
        work = working(guest)
        for number, (source, destination) in enumerate(((here, there), (there, here))):
            gateway.cli("volume", "share", "v")
            through = f"unix://{destination.folder}/move-{number}"
            source.virsh("migrate", "--live", "--p2p", "guest", destination.uri, through)
            guest.goes_on_in(destination)
            with gateway.client() as client:
                wait_until(lambda: client.attachment("v").frontends == 1, "the source is gone")
            gateway.cli("volume", "share", "v", "--off")
            sound(work, guest)
            work = working(guest)
        sound(work, guest)
