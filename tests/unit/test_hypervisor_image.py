"""How the guest image is made: the archive, the trimmed fio, and what decides that it is built anew."""

import io
import lzma
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone.hypervisor import guest_image, guest_kernel
from ringstone.hypervisor.cpio import CpioWriter
from ringstone.hypervisor.elf import drop_libraries
from ringstone.hypervisor.guest_image import FIO_LIBRARIES
from ringstone.hypervisor.guest_kernel import Kernel, module_dependencies, read_module
from ringstone.hypervisor.tools import GuestImageError


def _fio() -> bytes:
    fio = shutil.which("fio")
    assert fio is not None, "Debian's package fio is missing"
    return Path(fio).read_bytes()


def test_another_program_unpacks_the_archive(tmp_path: Path) -> None:
    archive = io.BytesIO()
    cpio = CpioWriter(archive)
    cpio.directory("tmp", 0o1777)
    cpio.file("etc/deep/odd", b"12345", 0o600)
    cpio.file("bin/tool", b"#!/bin/sh\n", 0o755)
    cpio.symlink("bin/alias", "tool")
    cpio.close()
    subprocess.run(
        ["busybox", "cpio", "-idm"], input=archive.getvalue(), cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "etc/deep/odd").read_bytes() == b"12345"
    assert (tmp_path / "etc/deep/odd").stat().st_mode & 0o7777 == 0o600
    assert (tmp_path / "bin/tool").stat().st_mode & 0o7777 == 0o755
    assert os.readlink(tmp_path / "bin/alias") == "tool"
    assert (tmp_path / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_fio_runs_without_the_libraries_of_its_network_engines(tmp_path: Path) -> None:
    fio = tmp_path / "fio"
    fio.write_bytes(drop_libraries(_fio(), FIO_LIBRARIES))
    fio.chmod(0o755)
    needed = subprocess.run(["ldd", str(fio)], capture_output=True, text=True, check=True).stdout
    assert "librbd" not in needed
    assert "librados" not in needed
    job = [
        "--name=job",
        f"--filename={tmp_path}/data",
        "--size=256k",
        "--bs=4k",
        "--rw=randwrite",
        "--verify=crc32c",
    ]
    for engine in ("psync", "libaio", "io_uring"):
        done = subprocess.run(
            [str(fio), *job, f"--ioengine={engine}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_program_that_needs_nothing_dropped_is_left_as_it_was_but_for_weak_symbols(tmp_path: Path) -> None:
    program = tmp_path / "program"
    found = shutil.which("mke2fs", path="/usr/sbin:/sbin")
    assert found is not None
    libraries = [
        "libext2fs.so.2",
        "libcom_err.so.2",
        "libblkid.so.1",
        "libuuid.so.1",
        "libe2p.so.2",
        "libc.so.6",
    ]
    program.write_bytes(drop_libraries(Path(found).read_bytes(), libraries))
    program.chmod(0o755)
    subprocess.run([str(program), "-V"], check=True, capture_output=True)


def test_what_is_no_elf_file_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        drop_libraries(b"#!/bin/sh\n", ["libc.so.6"])


def test_the_key_follows_kernel_packages_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(Path("linux-image-1"), "6.1.0", Path("image"), Path("modules"))
    key = guest_image._image_key(kernel, {"fio": "3.33"})
    assert guest_image._image_key(kernel, {"fio": "3.33"}) == key
    others = {
        guest_image._image_key(replace(kernel, tree=Path("linux-image-2")), {"fio": "3.33"}),
        guest_image._image_key(replace(kernel, version="6.1.1"), {"fio": "3.33"}),
        guest_image._image_key(kernel, {"fio": "3.34"}),
    }
    recipe = tmp_path / "recipe"
    recipe.write_text("another init")
    monkeypatch.setattr(guest_image, "_RECIPE", (recipe,))
    others.add(guest_image._image_key(kernel, {"fio": "3.33"}))
    assert len(others | {key}) == 5


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuestImageError, match="apt-get install no-such-package-a no-such-package-b"):
        guest_image._package_versions(["zstd", "no-such-package-a", "no-such-package-b"])


def test_module_dependencies_are_read_from_the_module() -> None:
    module = b"\0license=GPL\0depends=virtio-ring,virtio\0name=virtio_blk\0"
    assert module_dependencies(module) == ["virtio_ring", "virtio"]
    assert module_dependencies(b"\0depends=\0") == []


@pytest.mark.parametrize("parts", [(), ("base", "binary", "modules")], ids=["one", "several"])
def test_a_kernel_comes_with_all_its_packages(monkeypatch: pytest.MonkeyPatch, parts: Sequence[str]) -> None:
    """The list of what is built into Debian 14's kernel is in a package of its own."""
    image = "linux-image-7.2.12-cloud-amd64"
    others = [f"linux-{part}-7.2.12-cloud-amd64" for part in parts]
    depends = {
        guest_kernel.META_PACKAGE: [image],
        image: ["linux-base", "initramfs-tools", *others],
    }
    monkeypatch.setattr(
        guest_kernel,
        "_depends",
        lambda package: "".join(f"  Depends: {one}\n" for one in depends[package]),
    )
    assert list(guest_kernel._kernel_packages()) == [image, *others]


@pytest.mark.parametrize(
    ("image", "modules"),
    [
        ("boot/vmlinuz-6.1.0", "lib/modules/6.1.0"),
        ("boot/vmlinuz-6.12.1", "usr/lib/modules/6.12.1"),
        ("usr/lib/modules/7.3.4/vmlinuz", "usr/lib/modules/7.3.4"),
    ],
)
def test_a_kernel_is_found_wherever_debian_puts_it(tmp_path: Path, image: str, modules: str) -> None:
    """Debian 12, 13 and the backports of 13."""
    drivers = tmp_path / modules / "kernel" / "drivers"
    drivers.mkdir(parents=True)
    (tmp_path / image).parent.mkdir(exist_ok=True)
    (tmp_path / image).touch()
    (tmp_path / modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    (drivers / "plain-one.ko").write_bytes(b"plain")
    (drivers / "packed_one.ko.xz").write_bytes(lzma.compress(b"packed"))
    kernel = Kernel.find(tmp_path)
    assert (kernel.version, kernel.image) == (Path(modules).name, tmp_path / image)
    files = kernel.module_files()
    assert {name: read_module(path) for name, path in files.items()} == {
        "plain_one": b"plain",
        "packed_one": b"packed",
    }
    assert kernel.built_in() == {"virtio_pci"}


def test_a_folder_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match="has 0 kernels"):
        Kernel.find(tmp_path)
