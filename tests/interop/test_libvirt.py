"""A real libvirtd, whose QEMU is a user of its own, with the XML that `ringstone libvirt-xml` prints: of Debian 13, and
in the long form of Debian 12 and of Debian 13's backports too."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from ringstone.hypervisor import args
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Command, Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost, disk_of, wait_until
from tests.framework.libvirt import (
    QEMU_GROUP,
    QEMU_USER,
    ROOT,
    SUITES,
    DomainGuest,
    Libvirtd,
    libvirt_root,
)

MIB = 1 << 20
SHORT = "trixie"
UUID = "7cbd0d6d-d7fc-4bb6-8740-7d346a3bd95b"
# Below /etc/apparmor.d. Debian 12 knows no other; later ones call it deprecated, and read it.
LOCAL_ABSTRACTION = "local/abstractions/libvirt-qemu"
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


def in_root(suite: str, *command: str, stdin: str = "") -> str:
    """What a program of the root says, which must end well."""
    done = subprocess.run(
        [ROOT / "scripts/in-root", f"libvirt-{suite}", *command],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def printed(gateway: GatewayProcess, *more: str) -> str:
    return gateway.cli("libvirt-xml", "v", "--memory", "512M", "--domain-type", "qemu", *more).stdout


def working(guest: Guest, disk: str = "vda") -> Command:
    """Writes of which every one is read back."""
    job = FioJob("w", "randwrite", size=8 * MIB, depth=8, filename=f"/dev/{disk}", verify="write", seconds=2)
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
        in_root(suite, "xmllint", "--noout", "--relaxng", SCHEMA, str(path))


def test_apparmors_line_is_read_and_no_other_gives_the_socket(suite: str, tmp_path: Path) -> None:
    """Where AppArmor confines QEMU, on Debian: libvirt's helper writes a rule for a disk that is a file and none for a
    socket, so the line of deploy/ is needed, at a place that each version reads. The parser needs no kernel for it."""
    profiles = tmp_path / "apparmor.d"
    shutil.copytree(ROOT / f".cache/debian/libvirt-{suite}/etc/apparmor.d", profiles, symlinks=True)
    local = profiles / LOCAL_ABSTRACTION
    local.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "deploy/apparmor/libvirt-qemu", local)
    domain = tmp_path / "domain"
    domain.write_text("#include <tunables/global>\nprofile d {\n  #include <abstractions/libvirt-qemu>\n}\n")
    parser = ("/sbin/apparmor_parser", "--skip-kernel-load", "--skip-cache", "--base", str(profiles))
    in_root(suite, *parser, str(domain))
    assert "/run/ringstone/vhost/*.sock rw," in in_root(suite, *parser, "--preprocess", str(domain))
    described = xml.fromstring(
        args.libvirt_xml(
            "/run/ringstone/vhost/v.sock",
            volume="v",
            queues=1,
            memory_bytes=1 << 30,
            hugepages=False,
            domain_type="qemu",
        )
    )
    described.insert(0, xml.Element("uuid"))
    described[0].text = UUID
    devices = described.find("devices")
    assert devices is not None
    file = xml.SubElement(devices, "disk", type="file", device="disk")
    xml.SubElement(file, "source", file="/srv/file.img")
    xml.SubElement(file, "target", dev="vdb", bus="virtio")
    helper = ("/usr/lib/libvirt/virt-aa-helper", "--dryrun", "--create", "--uuid", f"libvirt-{UUID}")
    rules = in_root(suite, *helper, stdin=xml.tostring(described, encoding="unicode"))
    assert '"/srv/file.img" rwk,' in rules
    assert "ringstone" not in rules


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


@pytest.mark.soak
def test_a_domain_waits_for_the_right_to_connect(gateway: GatewayProcess, libvirtd: Start) -> None:
    """As with every socket of a release before, until somebody changed its owner by hand. QEMU tries again each second,
    as it does for a gateway that was restarted, and libvirt waits for it."""
    gateway.serve("other", kind="file")
    with gateway.client() as client:
        client.create_volume("v", pool="file", size=64 * MIB)
        client.attach("v", socket_owner="0", socket_group="0")
        daemon = libvirtd()
        path = daemon.domain(printed(gateway))
        with ThreadPoolExecutor(1) as beside:
            started = beside.submit(daemon.virsh, "create", path)
            wait_until(lambda: "Permission denied" in daemon.qemu_log(), "QEMU was refused")
            assert not started.done()
            client.detach("v")
            client.attach("v")
            started.result()
    with DomainGuest(daemon) as guest:
        sound(working(guest), guest)


@pytest.mark.soak
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
        with guest.going_on_in(daemon):
            daemon.virsh("restore", saved)
        assert guest.output("cat /kept/file") == "memory"
        sound(working(guest), guest)


@pytest.mark.soak
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
            through = f"unix://{destination.guests}/move-{number}"
            with guest.going_on_in(destination):
                source.virsh("migrate", "--live", "--p2p", "guest", destination.uri, through)
            with gateway.client() as client:
                wait_until(lambda: client.attachment("v").frontends == 1, "the source is gone")
            gateway.cli("volume", "share", "v", "--off")
            sound(work, guest)
            work = working(guest)
        sound(work, guest)
