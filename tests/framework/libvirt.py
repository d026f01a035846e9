"""A real libvirtd, of another Debian or this one, that nothing of this machine knows of.

It runs as root in namespaces of its own, in a root that scripts/debian-root has unpacked, and starts QEMU as user
libvirt-qemu, as on Debian. Its /etc, /run and /var are in memory and end with it; so do its domains, as its process
namespace does. Only /tmp is shared: the sockets of volumes, its own and the guests' files are there.
"""

import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree as xml

from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.guest_image import GuestImage
from ringstone.hypervisor.qemu import AGENT_PORT, HOTPLUG_SLOTS, QemuError
from tests.framework.guest import wait_until

ROOT = Path(__file__).resolve().parents[2]
# Debian's, by its base-passwd.
QEMU_USER = QEMU_GROUP = 64055
# Packages of a root, by Debian suite: libvirt 9.0, 11.3 and 12.9 with QEMU 7.2, 10.0 and 11.1.
SUITES = ("bookworm", "trixie", "trixie-backports")
PACKAGES = (
    *("libvirt-daemon", "libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients"),
    *("qemu-system-x86", "qemu-utils", "libxml2-utils", "apparmor", "passwd", "mount"),
)
_START_SECONDS = 60
_COMMAND_SECONDS = 120

_USERS = "root:x:0:0::/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin\n"
_GROUPS = "root:x:0:\ntty:x:5:\nkvm:x:104:libvirt-qemu\nlibvirt:x:110:\nlibvirt-qemu:x:64055:\n"
_QEMU_CONF = """
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
"""
_LIBVIRTD_CONF = """
unix_sock_dir = "{folder}"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
log_outputs = "3:file:{folder}/libvirtd.log"
"""
# The first process of the namespaces: what it mounts goes with them, and it waits for those whose parent has ended.
_INIT = """
set -e
root=$1 folder=$2 host=$3
hostname "$host"
mount --bind "$root" "$root"
# Without /dev/kvm: where it is there and of no use, libvirt asks QEMU for its abilities anew at each step.
mount -t tmpfs -o mode=755 none "$root/dev"
for device in null zero full random urandom tty; do
    cp -a "/dev/$device" "$root/dev/"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666,gid=5,mode=620 none "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 none "$root/run"
mount --rbind /tmp "$root/tmp"
cp -a "$root/etc" "$root/run/etc"
cp -a "$folder/etc/." "$root/run/etc/"
mount --bind "$root/run/etc" "$root/etc"
# What libvirt has found out of its QEMU stays in /var/cache for the next one.
for place in lib log; do
    mkdir -p "$root/var/$place"
    mount -t tmpfs -o mode=755 none "$root/var/$place"
done
mkdir -p "$root"/var/{log,cache}/libvirt/qemu "$root"/var/lib/libvirt/{qemu,boot} "$root/run/libvirt"
cp "$folder/kernel" "$folder/initrd" "$root/var/lib/libvirt/boot/"
# Of its drivers only QEMU's: that of networks wants a firewall.
drivers=$(echo "$root"/usr/lib/*/libvirt/connection-driver)
mkdir "$root/run/drivers"
cp "$drivers/libvirt_driver_qemu.so" "$root/run/drivers/"
mount --bind "$root/run/drivers" "$drivers"
# A chroot would not do: libvirt enters the mount namespace that it has made for a QEMU, and is at that one's root then.
mkdir "$root/run/host"
cd "$root"
pivot_root . run/host
exec chroot . /bin/sh -c 'umount -l /run/host; /usr/sbin/libvirtd & wait'
"""


class LibvirtError(Exception):
    """libvirt refused or did not answer; the message ends with what it said."""


def libvirt_root(suite: str) -> str:
    """The name of a root with libvirt and QEMU of `suite`, unpacked if it is not there: a minute and 300 MB."""
    name = f"libvirt-{suite}"
    subprocess.run([ROOT / "scripts/debian-root", name, suite, *PACKAGES], check=True, cwd=ROOT)
    return name


class Libvirtd:
    """One daemon, for the length of a `with` block. `folder` is below /tmp and all may go through it."""

    def __init__(self, root: str, folder: Path, image: GuestImage, *, host: str = "here") -> None:
        self.root = root
        self.folder = folder
        self._host = host
        etc = folder / "etc"
        (etc / "libvirt").mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost {host}\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "passwd").write_text(_USERS)
        (etc / "group").write_text(_GROUPS)
        (etc / "libvirt/qemu.conf").write_text(_QEMU_CONF)
        conf = _LIBVIRTD_CONF.format(folder=folder, uuid=uuid.uuid4())
        (etc / "libvirt/libvirtd.conf").write_text(conf)
        shutil.copy(image.kernel, folder / "kernel")
        shutil.copy(image.initrd, folder / "initrd")
        # Where QEMU's user makes its own files.
        self.guests = folder / "guests"
        self.guests.mkdir()
        os.chown(self.guests, QEMU_USER, QEMU_GROUP)

    def __enter__(self) -> Self:
        directory = ROOT / ".cache/debian" / self.root
        namespaces = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child"]
        with (self.folder / "output.log").open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "--", *namespaces, "--propagation", "private", "--"),
                    *("bash", "-c", _INIT, "libvirt-init", str(directory), str(self.folder), self._host),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._answers, "libvirtd answers", timeout_s=_START_SECONDS)
        except BaseException:
            self._end()
            raise
        return self

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise LibvirtError(f"libvirtd has ended.\n{self.log()}")
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / "libvirt-sock")) == 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """With everything in its namespaces."""
        self._process.kill()
        self._process.wait()

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    def virsh(self, *words: str, check: bool = True, timeout_s: float = _COMMAND_SECONDS) -> str:
        """What virsh of the same root says."""
        return self.tool("virsh", "--quiet", "--connect", self.uri, *words, check=check, timeout_s=timeout_s)

    def tool(self, *command: str, check: bool = True, timeout_s: float = _COMMAND_SECONDS) -> str:
        """A program of the same root."""
        done = subprocess.run(
            [ROOT / "scripts/in-root", self.root, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise LibvirtError(
                f"`{' '.join(command)}` ended with {done.returncode}: {done.stdout}\n{self.log()}"
            )
        return done.stdout.strip()

    def log(self) -> str:
        """The daemon's words, and those of its QEMUs."""
        logs = [self.folder / "output.log", self.folder / "libvirtd.log"]
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in logs if path.exists())

    # domains

    def qemu_log(self, name: str = "guest") -> str:
        """What the domain's QEMU has said, which is in memory of the namespaces."""
        path = self._inside(f"/var/log/libvirt/qemu/{name}.log")
        return path.read_text(errors="replace") if path.exists() else ""

    def _inside(self, path: str) -> Path:
        """What is in its root, as this process sees it."""
        unshare = self._process.pid
        init = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0]
        return Path(f"/proc/{init}/root{path}")

    def domain(self, printed: str, *, name: str = "guest") -> str:
        """What `ringstone libvirt-xml` has printed, with what an operator adds: here a kernel to boot, free slots for
        disks, a log of the console, and the agent's channel."""
        root = xml.fromstring(printed)
        root.find("name").text = name  # type: ignore[union-attr]
        system = root.find("os")
        devices = root.find("devices")
        assert system is not None
        assert devices is not None
        boot = "/var/lib/libvirt/boot"
        for tag, text in (("kernel", f"{boot}/kernel"), ("initrd", f"{boot}/initrd"), ("cmdline", _CMDLINE)):
            xml.SubElement(system, tag).text = text
        xml.SubElement(devices, "controller", type="pci", index="0", model="pcie-root")
        for _ in range(HOTPLUG_SLOTS + _OWN_SLOTS):
            xml.SubElement(devices, "controller", type="pci", model="pcie-root-port")
        serial = devices.find("serial")
        assert serial is not None
        xml.SubElement(serial, "log", file=str(self.guests / f"{name}.console"), append="on")
        channel = xml.SubElement(devices, "channel", type="unix")
        xml.SubElement(channel, "target", type="virtio", name=AGENT_PORT)
        path = self.folder / f"{name}.xml"
        path.write_text(xml.tostring(root, encoding="unicode"))
        return str(path)

    def agent_path(self) -> Path | None:
        """The agent's socket of the only domain, where libvirt has put it (9.0 below /var), also while the guest is
        still on its way here."""
        places = ("/run/libvirt/qemu/channel", "/var/lib/libvirt/qemu/channel/target")
        found = [path for place in places for path in self._inside(place).glob(f"*/{AGENT_PORT}")]
        return found[0] if found else None

    def console(self, name: str = "guest") -> str:
        path = self.guests / f"{name}.console"
        return path.read_text(errors="replace") if path.exists() else ""


# libvirt's own devices are in slots too: the first disk, the channel's controller and the balloon.
_OWN_SLOTS = 4
_CMDLINE = "console=ttyS0 panic=-1 audit=0 mitigations=off"


class DomainQemu:
    """In the place of ringstone.hypervisor.qemu.Qemu: a domain of libvirt's."""

    def __init__(self, libvirtd: Libvirtd, name: str) -> None:
        self._libvirtd = libvirtd
        self.name = name
        wait_until(lambda: libvirtd.agent_path() is not None, "the agent's channel is there")
        self.agent = socket.socket(socket.AF_UNIX)
        self.agent.connect(str(libvirtd.agent_path()))

    def describe(self, problem: str) -> str:
        tail = "\n".join(self._libvirtd.console(self.name).splitlines()[-25:])
        return f"{problem}.\n{self._libvirtd.log()}\n--- the console's last lines:\n{tail}"

    def wait(self, timeout_s: float) -> int:
        """QEMU's end is libvirt's to wait for."""
        raise QemuError(self.describe(f"The guest's channel has ended within {timeout_s} s"))

    def stop(self) -> None:
        self.agent.close()


class DomainGuest(Guest):
    """A guest in a domain that runs."""

    def __init__(self, libvirtd: Libvirtd, name: str = "guest", *, boot_timeout_s: float = 90) -> None:
        self.qemu = DomainQemu(libvirtd, name)  # type: ignore[assignment]
        self._received = bytearray()
        self._results = {}
        self._last_number = 0
        try:
            self.boot_id = self._wait_ready(boot_timeout_s)
        except BaseException:
            self.qemu.stop()
            raise

    @contextmanager
    def going_on_in(self, libvirtd: Libvirtd) -> Iterator[None]:
        """While what is done in the `with` block moves the guest there, or starts it again: its agent answers there
        afterwards. It is heard from the first moment on, as it ends the guest when nobody listens."""
        former = self.qemu
        name = former.name  # type: ignore[attr-defined]
        with ThreadPoolExecutor(1) as beside:
            coming = beside.submit(DomainQemu, libvirtd, name)
            try:
                yield
            finally:
                arrived = coming.result()
        self.moved_to(arrived)  # type: ignore[arg-type]
        former.agent.close()
