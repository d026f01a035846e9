"""Builds the guest image: Debian's cloud kernel and an initramfs made of Debian packages.

The kernel (ringstone.hypervisor.guest_kernel) is this machine's suite's, or another's. Everything else (busybox, fio,
e2fsprogs and the libraries they load) is taken from this machine's installed packages. An image is kept under
a key made of the packages' versions and this recipe, so a second call only finds it, without network.

`python -m ringstone.hypervisor.guest_image` builds it and prints the two paths.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringstone.hypervisor.cpio import CpioWriter
from ringstone.hypervisor.elf import drop_libraries
from ringstone.hypervisor.guest_kernel import (
    META_PACKAGE,
    Kernel,
    download_kernel,
    module_dependencies,
    newest_kernel,
    read_module,
)
from ringstone.hypervisor.tools import GuestImageError, locked, run_tool

HOST_PACKAGES = ("busybox-static", "dash", "e2fsprogs", "fio", "util-linux", "zstd")

# The shell is dash, since that of busybox runs its own blkdiscard or mke2fs whatever PATH says.
PROGRAMS = (
    "dash",
    "fio",
    "mke2fs",
    "e2fsck",
    "resize2fs",
    "tune2fs",
    "lsblk",
    "blkdiscard",
    "fstrim",
    "findmnt",
)
PROGRAM_ALIASES = {
    "sh": "dash",
    "mkfs.ext4": "mke2fs",
    "fsck.ext4": "e2fsck",
}
# What fio keeps of the libraries it links; see ringstone.hypervisor.elf. libaio is named anew in Debian 13.
FIO_LIBRARIES = ("libaio.so.1", "libaio.so.1t64", "libc.so.6", "libm.so.6", "libnuma.so.1", "libz.so.1")
EXTRA_FILES = ("/etc/mke2fs.conf",)
# Loaded in this order, each after what it depends on, unless it is built into the kernel as ext4 and the serial console
# are.
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_balloon")

_INIT = Path(__file__).with_name("guest-init.sh")
_AGENT = Path(__file__).with_name("guest-agent.sh")
_RECIPE = (
    Path(__file__),
    *(Path(__file__).with_name(name) for name in ("cpio.py", "elf.py", "guest_kernel.py")),
    _INIT,
    _AGENT,
)
_SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"

Report = Callable[[str], None]


@dataclass(frozen=True)
class GuestImage:
    """A bootable pair: `kernel` is a bzImage, `initrd` a zstd-compressed cpio archive."""

    kernel: Path
    initrd: Path
    kernel_version: str

    @property
    def key(self) -> str:
        """Names this very image; changes with any package or with the recipe."""
        return self.initrd.stem


def default_cache() -> Path:
    """`$RINGSTONE_CACHE/guest`, else `.cache/guest` of the source checkout, else
    `~/.cache/ringstone/guest`."""
    if configured := os.environ.get("RINGSTONE_CACHE"):
        return Path(configured) / "guest"
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").exists() and (checkout / "crates").is_dir():
        return checkout / ".cache" / "guest"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ringstone" / "guest"


def ensure_guest_image(
    cache: Path | None = None,
    *,
    update: bool = False,
    kernel_tree: Path | None = None,
    report: Report = lambda _: None,
) -> GuestImage:
    """The guest image, built if it is not in `cache`. `update` asks the package archive for a newer kernel;
    `kernel_tree`, a folder into which packages were unpacked, has another suite's.

    `report` is called with a sentence for each slow step. Raises GuestImageError.
    """
    cache = cache or default_cache()
    if kernel_tree is not None:
        cache = cache / f"kernel-{Kernel.find(kernel_tree).version}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        tree = kernel_tree if kernel_tree is not None or update else newest_kernel(cache)
        if tree is None:
            report(f"Downloading Debian's cloud kernel ({META_PACKAGE})")
            tree = download_kernel(cache)
        kernel = Kernel.find(tree)
        key = _image_key(kernel, _package_versions(HOST_PACKAGES))
        initrd = cache / f"{key}.initrd"
        if not initrd.exists():
            report("Building the guest's initramfs")
            _build_initrd(kernel, initrd)
            _drop_older(cache, keep=(tree, initrd))
        return GuestImage(kernel=kernel.image, initrd=initrd, kernel_version=kernel.version)


# The initramfs.


def _package_versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    missing = []
    for package in packages:
        done = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", package],
            capture_output=True,
            text=True,
        )
        status, _, version = done.stdout.partition(" ")
        if status == "installed":
            versions[package] = version
        else:
            missing.append(package)
    if missing:
        raise GuestImageError(
            f"The guest image needs packages that are missing; run `apt-get install {' '.join(missing)}`."
        )
    return versions


def _image_key(kernel: Kernel, versions: dict[str, str]) -> str:
    digest = hashlib.sha256(f"{kernel.tree.name}\0{kernel.version}".encode())
    for package, version in sorted(versions.items()):
        digest.update(f"\0{package}={version}".encode())
    for part in _RECIPE:
        digest.update(b"\0" + part.read_bytes())
    return f"guest-{digest.hexdigest()[:16]}"


def _build_initrd(kernel: Kernel, initrd: Path) -> None:
    with tempfile.TemporaryDirectory(dir=initrd.parent, prefix="build-") as folder:
        archive = Path(folder) / "initramfs.cpio"
        with archive.open("wb") as out:
            cpio = CpioWriter(out)
            _add_base(cpio)
            _add_busybox(cpio)
            _add_programs(cpio, Path(folder))
            _add_modules(cpio, kernel)
            cpio.close()
        packed = Path(folder) / "initramfs.zst"
        run_tool(["zstd", "-q", "-T0", "-9", str(archive), "-o", str(packed)])
        packed.rename(initrd)


def _add_base(cpio: CpioWriter) -> None:
    for directory in ("dev", "proc", "sys", "run", "mnt", "root", "etc"):
        cpio.directory(directory)
    cpio.directory("tmp", 0o1777)
    cpio.character_device("dev/console", 5, 1)
    cpio.character_device("dev/null", 1, 3, 0o666)
    cpio.symlink("etc/mtab", "/proc/self/mounts")
    cpio.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    for extra in EXTRA_FILES:
        cpio.file(extra, Path(extra).read_bytes())
    cpio.file("init", _INIT.read_bytes(), 0o755)
    cpio.file("agent", _AGENT.read_bytes(), 0o755)


def _add_busybox(cpio: CpioWriter) -> None:
    busybox = _which("busybox")
    cpio.file("bin/busybox", busybox.read_bytes(), 0o755)
    ours = {*PROGRAMS, *PROGRAM_ALIASES, "busybox"}
    for applet in run_tool([str(busybox), "--list"]).split():
        if applet not in ours:
            cpio.symlink(f"bin/{applet}", "busybox")


def _add_programs(cpio: CpioWriter, scratch: Path) -> None:
    libraries: set[str] = set()
    for name in PROGRAMS:
        content = _which(name).read_bytes()
        if name == "fio":
            content = drop_libraries(content, FIO_LIBRARIES)
        cpio.file(f"bin/{name}", content, 0o755)
        program = scratch / name
        program.write_bytes(content)
        program.chmod(0o755)
        # "libz.so.1 => /lib/.../libz.so.1 (0x...)" and "/lib64/ld-linux-x86-64.so.2 (0x...)"
        libraries.update(re.findall(r"(/\S+) \(0x", run_tool(["ldd", str(program)])))
    for alias, name in PROGRAM_ALIASES.items():
        cpio.symlink(f"bin/{alias}", name)
    for library in sorted(libraries):
        cpio.file(library, Path(library).read_bytes(), 0o755)


def _which(name: str) -> Path:
    found = shutil.which(name, path=_SEARCH)
    if found is None:
        raise GuestImageError(
            f"The program {name} is missing; run `apt-get install {' '.join(HOST_PACKAGES)}`."
        )
    return Path(found)


def _add_modules(cpio: CpioWriter, kernel: Kernel) -> None:
    files = kernel.module_files()
    order: list[str] = []
    known = kernel.built_in()

    def add(name: str) -> None:
        if name in known:
            return
        known.add(name)
        if name not in files:
            raise GuestImageError(f"The kernel {kernel.version} has no module {name} and cannot be used.")
        content = read_module(files[name])
        for dependency in module_dependencies(content):
            add(dependency)
        order.append(name)
        cpio.file(f"modules/{name}.ko", content)

    for name in MODULES:
        add(name)
    cpio.file("modules/order", "".join(f"{name}.ko\n" for name in order).encode())


def _drop_older(cache: Path, *, keep: tuple[Path, ...]) -> None:
    for path in (*cache.glob("*.initrd"), *cache.glob("linux-image-*")):
        if path in keep:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main(arguments: Sequence[str]) -> int:
    """The command line: `--update` looks for a newer kernel."""
    if unknown := [argument for argument in arguments if argument != "--update"]:
        print(f"Unknown argument {unknown[0]}; the only one is --update.", file=sys.stderr)
        return 2
    try:
        image = ensure_guest_image(
            update="--update" in arguments, report=lambda step: print(step, flush=True)
        )
    except GuestImageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Kernel  {image.kernel}\nInitrd  {image.initrd} ({image.initrd.stat().st_size >> 20} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
