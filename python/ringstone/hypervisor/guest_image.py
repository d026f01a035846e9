"""Builds the guest image: Debian's cloud kernel and an initramfs made of Debian packages.

The kernel's package is downloaded and unpacked into a cache, never installed. Everything else (busybox, fio,
e2fsprogs and the libraries they load) is taken from this machine's installed packages. An image is kept under
a key made of the packages' versions and this recipe, so a second call only finds it, without network.

`python -m ringstone.hypervisor.guest_image` builds it and prints the two paths.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringstone.errors import RingstoneError
from ringstone.hypervisor.cpio import CpioWriter
from ringstone.hypervisor.elf import drop_libraries

KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
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
# What fio keeps of the libraries it links; see ringstone.hypervisor.elf.
FIO_LIBRARIES = ("libaio.so.1", "libc.so.6", "libm.so.6", "libnuma.so.1", "libz.so.1")
EXTRA_FILES = ("/etc/mke2fs.conf",)
# Loaded in this order, each after what it depends on. ext4 and the serial console are built into the kernel.
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_balloon")

_INIT = Path(__file__).with_name("guest-init.sh")
_AGENT = Path(__file__).with_name("guest-agent.sh")
_RECIPE = (Path(__file__), *(Path(__file__).with_name(name) for name in ("cpio.py", "elf.py")), _INIT, _AGENT)
_SEARCH = "/usr/sbin:/usr/bin:/sbin:/bin"

Report = Callable[[str], None]


class GuestImageError(RingstoneError):
    """The image cannot be built; the message says what to do."""


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
    cache: Path | None = None, *, update: bool = False, report: Report = lambda _: None
) -> GuestImage:
    """The guest image, built if it is not in `cache`. `update` asks the package archive for a newer kernel.

    `report` is called with a sentence for each slow step. Raises GuestImageError.
    """
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        kernel = None if update else _newest_kernel(cache)
        if kernel is None:
            report(f"Downloading Debian's cloud kernel ({KERNEL_META_PACKAGE})")
            kernel = _download_kernel(cache)
        kernel_version = _kernel_version(kernel)
        key = _image_key(kernel, _package_versions(HOST_PACKAGES))
        initrd = cache / f"{key}.initrd"
        if not initrd.exists():
            report("Building the guest's initramfs")
            _build_initrd(kernel, kernel_version, initrd)
            _drop_older(cache, keep=(kernel, initrd))
        return GuestImage(
            kernel=kernel / "boot" / f"vmlinuz-{kernel_version}", initrd=initrd, kernel_version=kernel_version
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`: two builds into one cache take turns."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_tool(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """Standard output of `command`; its last words as the error when it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise GuestImageError(f"The program {command[0]} is missing; install it and try again.") from error
    if done.returncode:
        last_words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise GuestImageError(f"`{' '.join(command)}` failed: {last_words}")
    return done.stdout


# The kernel: one folder per package version, unpacked from the .deb.


def _newest_kernel(cache: Path) -> Path | None:
    kernels = [path for path in cache.glob("linux-image-*") if path.is_dir()]
    return max(kernels, key=lambda path: path.stat().st_mtime, default=None)


def _kernel_version(kernel: Path) -> str:
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    return image.name.removeprefix("vmlinuz-")


def _download_kernel(cache: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        try:
            deb = _apt_download(Path(folder))
        except GuestImageError:
            # Package lists that are missing or older than the archive; only root can renew them.
            if os.geteuid() != 0:
                raise
            run_tool(["apt-get", "update", "-qq"])
            deb = _apt_download(Path(folder))
        kernel = cache / deb.stem
        unpacked = Path(folder) / "unpacked"
        run_tool(["dpkg-deb", "--extract", str(deb), str(unpacked)])
        shutil.rmtree(kernel, ignore_errors=True)
        unpacked.rename(kernel)
        os.utime(kernel)  # dpkg-deb keeps the package's times, and the newest folder is the one in use
        return kernel


def _apt_download(folder: Path) -> Path:
    depends = run_tool(["apt-cache", "depends", "--important", KERNEL_META_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if not found:
        raise GuestImageError(
            f"The package archive does not know {KERNEL_META_PACKAGE}; run `apt-get update` and try again."
        )
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    run_tool(["apt-get", *options, "download", "-qq", found[1]], cwd=folder)
    (deb,) = folder.glob("*.deb")
    return deb


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


def _image_key(kernel: Path, versions: dict[str, str]) -> str:
    digest = hashlib.sha256(kernel.name.encode())
    for package, version in sorted(versions.items()):
        digest.update(f"\0{package}={version}".encode())
    for part in _RECIPE:
        digest.update(b"\0" + part.read_bytes())
    return f"guest-{digest.hexdigest()[:16]}"


def _build_initrd(kernel: Path, kernel_version: str, initrd: Path) -> None:
    with tempfile.TemporaryDirectory(dir=initrd.parent, prefix="build-") as folder:
        archive = Path(folder) / "initramfs.cpio"
        with archive.open("wb") as out:
            cpio = CpioWriter(out)
            _add_base(cpio)
            _add_busybox(cpio)
            _add_programs(cpio, Path(folder))
            _add_modules(cpio, kernel / "lib" / "modules" / kernel_version)
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


def _add_modules(cpio: CpioWriter, modules: Path) -> None:
    by_name = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    order: list[str] = []

    def add(name: str) -> None:
        if name in order:
            return
        if name not in by_name:
            raise GuestImageError(
                f"The kernel in {modules} has no module {name}; this kernel cannot be used."
            )
        content = by_name[name].read_bytes()
        for dependency in _module_dependencies(content):
            add(dependency)
        order.append(name)
        cpio.file(f"modules/{name}.ko", content)

    for name in MODULES:
        add(name)
    cpio.file("modules/order", "".join(f"{name}.ko\n" for name in order).encode())


def _module_dependencies(module: bytes) -> list[str]:
    """What the `.modinfo` section says: depmod itself reads dependencies from the symbols, the build wrote
    both."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    if found is None:
        return []
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name]


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
