"""The kernel of the guest image: Debian's cloud kernel, unpacked from its packages and never installed.

Debian has laid it out in three ways: /boot and /lib/modules with plain modules (12), /boot and /usr/lib/modules with
compressed ones (13), and all of it below /usr/lib/modules, from several packages (since 7.2).
"""

import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringstone.hypervisor.tools import GuestImageError, run_tool

META_PACKAGE = "linux-image-cloud-amd64"
# What the package of a kernel's image leaves to others.
_PARTS = re.compile(r"Depends: (linux-(?:base|binary|modules)-\S+)")


@dataclass(frozen=True)
class Kernel:
    """A kernel below `tree`, a folder into which packages were unpacked. `image` is a bzImage."""

    tree: Path
    version: str
    image: Path
    modules: Path

    @classmethod
    def find(cls, tree: Path) -> "Kernel":
        """The kernel in `tree`; GuestImageError unless there is one."""
        found = [path for path in tree.glob("usr/lib/modules/*/vmlinuz")] + list(tree.glob("boot/vmlinuz-*"))
        if len(found) != 1:
            raise GuestImageError(f"{tree} has {len(found)} kernels; it must have one.")
        image = found[0]
        version = image.parent.name if image.name == "vmlinuz" else image.name.removeprefix("vmlinuz-")
        for library in ("usr/lib", "lib"):
            modules = tree / library / "modules" / version
            if modules.is_dir():
                return cls(tree, version, image, modules)
        raise GuestImageError(f"{tree} has no modules of its kernel {version}.")

    def module_files(self) -> dict[str, Path]:
        """Every module's file by its name with underscores, as the kernel has it."""
        return {
            _module_name(path): path
            for path in self.modules.rglob("*.ko*")
            if path.name.endswith((".ko", ".ko.xz"))
        }

    def built_in(self) -> set[str]:
        """Names of modules that the kernel has in itself."""
        lines = (self.modules / "modules.builtin").read_text().splitlines()
        return {_module_name(Path(line)) for line in lines}


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """A module, unpacked. The guest's busybox knows plain ones only."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def module_dependencies(module: bytes) -> list[str]:
    """What the `.modinfo` section says: depmod itself reads dependencies from the symbols, the build wrote
    both."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    if found is None:
        return []
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name]


# Packages of the suite that this machine has, in a cache: one folder per version.


def newest_kernel(cache: Path) -> Path | None:
    """The folder that was unpacked last."""
    kernels = [path for path in cache.glob("linux-image-*") if path.is_dir()]
    return max(kernels, key=lambda path: path.stat().st_mtime, default=None)


def download_kernel(cache: Path) -> Path:
    """Unpack the kernel of this machine's package archive into `cache`."""
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        try:
            debs = _apt_download(Path(folder))
        except GuestImageError:
            # Package lists that are missing or older than the archive; only root can renew them.
            if os.geteuid() != 0:
                raise
            run_tool(["apt-get", "update", "-qq"])
            debs = _apt_download(Path(folder))
        (name,) = (deb.stem for deb in debs if deb.name.startswith("linux-image-"))
        unpacked = Path(folder) / "unpacked"
        for deb in debs:
            run_tool(["dpkg-deb", "--extract", str(deb), str(unpacked)])
        kernel = cache / name
        shutil.rmtree(kernel, ignore_errors=True)
        unpacked.rename(kernel)
        os.utime(kernel)  # dpkg-deb keeps the package's times, and the newest folder is the one in use
        return kernel


def _apt_download(folder: Path) -> list[Path]:
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    run_tool(["apt-get", *options, "download", "-qq", *_kernel_packages()], cwd=folder)
    return sorted(folder.glob("*.deb"))


def _kernel_packages() -> Iterator[str]:
    found = re.search(r"Depends: (linux-image-\S+)", _depends(META_PACKAGE))
    if not found:
        raise GuestImageError(
            f"The package archive does not know {META_PACKAGE}; run `apt-get update` and try again."
        )
    yield found[1]
    yield from _PARTS.findall(_depends(found[1]))


def _depends(package: str) -> str:
    return run_tool(["apt-cache", "depends", "--important", package])
