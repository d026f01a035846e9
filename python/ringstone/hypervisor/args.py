"""What starts a VM whose disk is a volume: QEMU command lines and libvirt domain XML.

A vhost-user backend reads and writes guest memory itself, so guest memory must be shared: a memfd (or
hugetlbfs) object with share=on. QEMU is the frontend and connects to the volume's socket; that it connects again lets
a guest outlive a restart of the gateway. What QEMU's versions call things is in ringstone.hypervisor.versions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

from ringstone.errors import InvalidError
from ringstone.hypervisor.versions import INFLIGHT_MIGRATION, NEWEST, RECONNECT_MS, RINGS_OF_1024, QemuVersion

MIB = 1 << 20
# What an emulated guest has more, see memory_args. QEMU rounds memory up to a multiple of it.
EMULATED_EXTRA = 8 << 10
QUEUE_SIZE = 256  # a power of two; two guest jobs at depth 128 fill one queue
QUEUE_SIZES = (128, 256, 512, 1024)  # QEMU 7.2 takes fewer than 128 for a mistake
MOST_QUEUE_SIZE = QUEUE_SIZES[-1]


def device_id(volume: str) -> str:
    """A QEMU object id for a volume: ids start with a letter and hold letters, digits, "-", "." and "_"
    only."""
    return "rs-" + re.sub(r"[^A-Za-z0-9._-]", "_", volume)


def _option(value: str) -> str:
    """A value inside a QEMU option list, where a comma is doubled."""
    return value.replace(",", ",,")


def _one_of(values: Sequence[int]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


def memory_args(memory_bytes: int, *, hugepages: bool, emulated: bool = False) -> list[str]:
    """Guest memory that a vhost-user backend can map: `memory_bytes`, a multiple of 2 MiB, shared.

    `emulated`: of a guest under TCG that may be migrated, and gets EMULATED_EXTRA more. QEMU before 9.0 looks for
    written pages 64 at a time where the memory is a whole number of 64 pages, and forgets to tell TCG; what the guest
    writes from then on may be left behind at the source (fixed by QEMU's commit 03bfc2188f). With two pages more it
    looks at them one by one.
    """
    if memory_bytes <= 0 or memory_bytes % (2 * MIB):
        raise ValueError(f"Guest memory of {memory_bytes} bytes is not a multiple of 2 MiB; give it as such.")
    if emulated and hugepages:
        raise ValueError(
            "A guest in huge pages cannot have two small pages more; leave emulated or hugepages out."
        )
    size = f"{(memory_bytes + EMULATED_EXTRA) // 1024}K" if emulated else f"{memory_bytes // MIB}M"
    backend = f"memory-backend-memfd,id=rs-memory,size={size},share=on"
    if hugepages:
        backend += ",hugetlb=on"
    return [
        "-m",
        size,
        "-object",
        backend,
        "-machine",
        "memory-backend=rs-memory",
    ]


@dataclass(frozen=True)
class Disk:
    """A vhost-user-blk disk of a guest: the volume `volume` behind `socket`.

    A guest uses one queue a vCPU at most, up to `queues`, each of `queue_size` entries, a power of two; by default of
    as many as QEMU will then use. Both ends of a migration must have the same. `packed` offers packed rings, which a
    driver that does not know them leaves alone. QEMU tries again every `reconnect_s` seconds after the backend has gone
    (0: never). `inflight_migration`: a migration takes requests in flight along, where both ends have it.
    """

    socket: str
    volume: str
    queues: int
    queue_size: int | None = None
    packed: bool = True
    reconnect_s: int = 1
    inflight_migration: bool = False

    def args(self, qemu: QemuVersion = NEWEST) -> list[str]:
        """QEMU's arguments. ValueError for a number of queues that no disk has, InvalidError for what `qemu` cannot."""
        if not 1 <= self.queues <= 64:
            raise ValueError(f"{self.queues} queues are out of range; give 1 to 64.")
        queue_size = self.queue_size or (MOST_QUEUE_SIZE if RINGS_OF_1024(qemu) else QUEUE_SIZE)
        if queue_size not in QUEUE_SIZES:
            raise InvalidError(
                f"A queue of {queue_size} entries is none of QEMU's; give {_one_of(QUEUE_SIZES)}."
            )
        name = device_id(self.volume)
        chardev = f"socket,id={name}-socket,path={_option(self.socket)}"
        if self.reconnect_s:
            option, value = reconnect_option(self.reconnect_s, qemu)
            chardev += f",{option}={value}"
        device = f"vhost-user-blk-pci,id={name},chardev={name}-socket"
        device += f",num-queues={self.queues},queue-size={queue_size}"
        if self.packed:
            device += ",packed=on"
        if self.inflight_migration:
            if not INFLIGHT_MIGRATION(qemu):
                raise InvalidError(
                    f"QEMU {qemu} cannot migrate requests in flight; {INFLIGHT_MIGRATION.since} is the first that can."
                )
            device += ",inflight-migration=on"
        return ["-chardev", chardev, "-device", device]


def reconnect_option(reconnect_s: int, qemu: QemuVersion) -> tuple[str, int]:
    """Name and value of a socket chardev's option to connect again every `reconnect_s` seconds, on the command line and
    over QMP."""
    return ("reconnect-ms", reconnect_s * 1000) if RECONNECT_MS(qemu) else ("reconnect", reconnect_s)


def qemu_args(
    disk: Disk, *, memory_bytes: int, hugepages: bool = False, qemu: QemuVersion = NEWEST
) -> list[str]:
    """Arguments to add to a qemu-system command line: the shared memory and the disk.

    QEMU merges the `-machine` option with one given elsewhere on the line, so `-machine q35,accel=kvm` stays
    the caller's. Further volumes of the same VM add only `Disk.args`.
    """
    return [*memory_args(memory_bytes, hugepages=hugepages), *disk.args(qemu)]


def libvirt_disk(
    socket: str, *, queues: int, packed: bool = True, target: str = "vda", reconnect_s: int = 1
) -> xml.Element:
    """The `<disk>` element of one volume (libvirt "Format of the domain XML", disks of type vhostuser)."""
    disk = xml.Element("disk", type="vhostuser", device="disk")
    driver = xml.SubElement(
        disk, "driver", name="qemu", type="raw", queues=str(queues), queue_size=str(QUEUE_SIZE)
    )
    if packed:
        driver.set("packed", "on")
    source = xml.SubElement(disk, "source", type="unix", path=socket)
    if reconnect_s:
        xml.SubElement(source, "reconnect", enabled="yes", timeout=str(reconnect_s))
    xml.SubElement(disk, "target", dev=target, bus="virtio")
    return disk


def libvirt_disk_xml(socket: str, *, queues: int, packed: bool = True, target: str = "vda") -> str:
    """The `<disk>` alone, for a domain that has shared memory."""
    disk = libvirt_disk(socket, queues=queues, packed=packed, target=target)
    xml.indent(disk)
    return xml.tostring(disk, encoding="unicode")


def libvirt_xml(
    socket: str,
    *,
    volume: str,
    queues: int,
    memory_bytes: int,
    hugepages: bool,
    packed: bool = True,
    vcpus: int = 2,
    target: str = "vda",
    reconnect_s: int = 1,
    domain_type: str = "kvm",
) -> str:
    """A `<domain>` that starts as it is and boots from the volume, to be completed with networks and
    consoles. `domain_type`: kvm, or qemu for a guest that is emulated.

    In an existing domain take over `<memoryBacking>` and the `<disk>`; the guest's memory must be shared, or
    libvirt refuses the disk.
    """
    if memory_bytes <= 0 or memory_bytes % (2 * MIB):
        raise ValueError(f"Guest memory of {memory_bytes} bytes is not a multiple of 2 MiB; give it as such.")
    domain = xml.Element("domain", type=domain_type)
    xml.SubElement(domain, "name").text = volume
    xml.SubElement(domain, "memory", unit="KiB").text = str(memory_bytes // 1024)
    backing = xml.SubElement(domain, "memoryBacking")
    if hugepages:
        xml.SubElement(backing, "hugepages")
    xml.SubElement(backing, "source", type="memfd")
    xml.SubElement(backing, "access", mode="shared")
    xml.SubElement(domain, "vcpu").text = str(vcpus)
    system = xml.SubElement(domain, "os")
    xml.SubElement(system, "type", arch="x86_64", machine="q35").text = "hvm"
    # Without ACPI a guest hears of no shutdown, and some do not start.
    features = xml.SubElement(domain, "features")
    xml.SubElement(features, "acpi")
    xml.SubElement(features, "apic")
    devices = xml.SubElement(domain, "devices")
    devices.append(libvirt_disk(socket, queues=queues, packed=packed, target=target, reconnect_s=reconnect_s))
    serial = xml.SubElement(devices, "serial", type="pty")
    xml.SubElement(serial, "target", port="0")
    xml.indent(domain)
    return xml.tostring(domain, encoding="unicode")
