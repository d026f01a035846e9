"""What QEMU and libvirt are told about a volume."""

import itertools
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from ringstone.errors import InvalidError
from ringstone.hypervisor.args import Disk, device_id, libvirt_disk_xml, libvirt_xml, memory_args, qemu_args
from ringstone.hypervisor.versions import QemuVersion

GIB = 1 << 30
DISK = Disk("/run/a.sock", "a", queues=4)


def _options(arguments: list[str], name: str) -> list[str]:
    return [value for option, value in itertools.pairwise(arguments) if option == name]


def test_guest_memory_is_shared_and_of_the_given_size() -> None:
    arguments = qemu_args(DISK, memory_bytes=GIB)
    assert _options(arguments, "-m") == ["1024M"]
    assert _options(arguments, "-object") == ["memory-backend-memfd,id=rs-memory,size=1024M,share=on"]
    assert _options(arguments, "-machine") == ["memory-backend=rs-memory"]


def test_huge_pages_are_asked_of_the_memfd() -> None:
    arguments = qemu_args(DISK, memory_bytes=GIB, hugepages=True)
    assert _options(arguments, "-object")[0].endswith(",share=on,hugetlb=on")


def test_an_emulated_guest_has_two_pages_more_than_qemu_looks_at_together() -> None:
    arguments = memory_args(GIB, hugepages=False, emulated=True)
    assert _options(arguments, "-m") == ["1048584K"]
    assert _options(arguments, "-object") == ["memory-backend-memfd,id=rs-memory,size=1048584K,share=on"]
    with pytest.raises(ValueError, match="leave emulated or hugepages out"):
        memory_args(GIB, hugepages=True, emulated=True)


@pytest.mark.parametrize(
    ("version", "reconnect"),
    [
        ("7.2", "reconnect=1"),
        ("9.1", "reconnect=1"),
        ("9.2", "reconnect-ms=1000"),
        ("11.1", "reconnect-ms=1000"),
        ("12.0", "reconnect-ms=1000"),
    ],
)
def test_the_disk_reconnects_and_has_the_queues(version: str, reconnect: str) -> None:
    arguments = DISK.args(QemuVersion.parse(version))
    assert _options(arguments, "-chardev") == [f"socket,id=rs-a-socket,path=/run/a.sock,{reconnect}"]
    assert _options(arguments, "-device") == [
        "vhost-user-blk-pci,id=rs-a,chardev=rs-a-socket,num-queues=4,queue-size=256,packed=on"
    ]


def test_an_unknown_version_gets_the_newest_form() -> None:
    assert DISK.args() == DISK.args(QemuVersion.parse("42.1"))


def test_packed_rings_can_be_left_out() -> None:
    assert replace(DISK, packed=False).args()[3].endswith(",queue-size=256")
    assert "packed" not in libvirt_xml(
        "/run/a.sock", volume="a", queues=1, packed=False, memory_bytes=GIB, hugepages=False
    )


def test_requests_in_flight_move_along_where_qemu_can() -> None:
    disk = replace(DISK, inflight_migration=True)
    assert disk.args(QemuVersion(11, 0))[3].endswith(",inflight-migration=on")
    with pytest.raises(InvalidError, match=r"QEMU 10\.2 cannot .* 11\.0 is the first"):
        disk.args(QemuVersion(10, 2))


def test_a_comma_in_the_socket_path_does_not_end_the_option() -> None:
    assert "path=/run/a,,b.sock" in Disk("/run/a,b.sock", "a", queues=1).args()[1]


def test_ids_are_valid_whatever_the_name() -> None:
    assert device_id("9 lives/ä") == "rs-9_lives__"


@pytest.mark.parametrize("memory_bytes", [0, -GIB, GIB + 4096])
def test_memory_that_cannot_be_in_huge_pages_is_refused(memory_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple of 2 MiB"):
        qemu_args(DISK, memory_bytes=memory_bytes)
    with pytest.raises(ValueError, match="multiple of 2 MiB"):
        libvirt_xml("/run/a.sock", volume="a", queues=1, memory_bytes=memory_bytes, hugepages=False)


@pytest.mark.parametrize("queues", [0, 65])
def test_queues_out_of_range_are_refused(queues: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        replace(DISK, queues=queues).args()


@pytest.mark.parametrize("hugepages", [False, True])
def test_the_domain_has_what_a_vhost_user_disk_needs(hugepages: bool) -> None:
    domain = xml.fromstring(
        libvirt_xml("/run/a&b.sock", volume="a", queues=4, memory_bytes=GIB, hugepages=hugepages)
    )
    backing = domain.find("memoryBacking")
    assert backing is not None
    assert (backing.find("hugepages") is not None) is hugepages
    assert [child.attrib for child in backing if child.tag != "hugepages"] == [
        {"type": "memfd"},
        {"mode": "shared"},
    ]
    disk = domain.find("devices/disk")
    assert disk is not None
    assert disk.attrib == {"type": "vhostuser", "device": "disk"}
    assert {child.tag: child.attrib for child in disk.iter()} | {"disk": {}} == {
        "disk": {},
        "driver": {"name": "qemu", "type": "raw", "queues": "4", "queue_size": "256", "packed": "on"},
        "source": {"type": "unix", "path": "/run/a&b.sock"},
        "reconnect": {"enabled": "yes", "timeout": "1"},
        "target": {"dev": "vda", "bus": "virtio"},
    }


def test_a_domain_is_of_the_type_that_is_asked_for_and_hears_of_a_shutdown() -> None:
    """It had no ACPI, so that `virsh shutdown` did nothing."""
    for kind in ("kvm", "qemu"):
        domain = xml.fromstring(
            libvirt_xml("/a.sock", volume="a", queues=1, memory_bytes=GIB, hugepages=False, domain_type=kind)
        )
        assert domain.attrib == {"type": kind}
        assert domain.find("features/acpi") is not None


def test_a_disk_alone_is_the_domains() -> None:
    disk = xml.fromstring(libvirt_disk_xml("/a.sock", queues=3, packed=False, target="vdc"))
    assert disk.tag == "disk"
    assert disk.find("target").attrib == {"dev": "vdc", "bus": "virtio"}  # type: ignore[union-attr]
    whole = libvirt_xml(
        "/a.sock", volume="a", queues=3, memory_bytes=GIB, hugepages=False, packed=False, target="vdc"
    )
    inside = xml.fromstring(whole).find("devices/disk")
    assert inside is not None
    assert [one.attrib for one in inside.iter()] == [one.attrib for one in disk.iter()]


@pytest.mark.skipif(
    shutil.which("virt-xml-validate") is None or shutil.which("xmllint") is None,
    reason="needs Debian's packages libvirt-clients and libxml2-utils",
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hugepages", [False, True])
def test_libvirts_own_schema_accepts_the_domain(tmp_path: Path, hugepages: bool, packed: bool) -> None:
    path = tmp_path / "domain.xml"
    domain = libvirt_xml(
        "/run/a.sock", volume="a", queues=4, memory_bytes=GIB, hugepages=hugepages, packed=packed
    )
    path.write_text(domain)
    done = subprocess.run(["virt-xml-validate", str(path), "domain"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
