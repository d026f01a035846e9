"""Ringstone's Debian packages, made from this checkout, and a guest with systemd to install them in."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringstone.hypervisor.debian_root import disk_args, make_image
from tests.framework.installed import ROOT, Installed, booted

PYTHON = "/usr/lib/ringstone/bin/python"
# Where the guest finds the packages.
SHELF = "/mnt"
_IMAGE_BYTES = 128 << 20
# To unpack, on an emulated CPU, and to have a gateway start or taken over.
_DPKG_SECONDS = 400.0


class Packaged(Installed):
    """A guest with nothing of Ringstone's installed. `first` and `newer` are folders of packages in it, alike but for
    their version and the release that they say they are."""

    first = f"{SHELF}/first"
    newer = f"{SHELF}/newer"

    def dpkg(self, arguments: str) -> str:
        """What dpkg and the packages' scripts say; it must end with 0."""
        return self.shell(f"dpkg {arguments} 2>&1", timeout_s=_DPKG_SECONDS)

    def files(self) -> set[str]:
        """All paths there are, but for those that every system writes by itself."""
        own = "/var/log/journal /var/lib/dpkg /var/lib/systemd /var/cache /var/log /var/tmp /tmp /mnt"
        left_out = " -o ".join(f"-path {path}" for path in own.split())
        run = "find /run/ringstone* /dev/shm -not -name 'ringstone-agent' -print 2>/dev/null"
        return set(self.shell(f"find / -xdev \\( {left_out} \\) -prune -o -print; {run}; true").splitlines())


@contextmanager
def packaged(suite: str, folder: Path) -> Iterator[Packaged]:
    """A booted guest of that Debian, with the packages at hand."""
    shelf = folder / "shelf"
    make_packages(suite, shelf / "first")
    for package in sorted((shelf / "first").glob("*.deb")):
        renew(package, shelf / "newer")
    image = folder / "packages.ext4"
    make_image(shelf, image, _IMAGE_BYTES)
    with booted(suite, folder / "guest", disk_args(image, "packages", read_only=True)) as guest:
        system = Packaged(guest, PYTHON)
        system.shell(f"mount -o ro /dev/disk/by-id/virtio-packages {SHELF}")
        yield system


def make_packages(suite: str, out: Path, *arguments: str) -> None:
    """The packages alone, without the engine's debug symbols."""
    make = [sys.executable, str(ROOT / "packaging" / "make_packages.py"), "--suite", suite, "--out", str(out)]
    done = subprocess.run([*make, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (*out.glob("ringstone-dbgsym_*.deb"), *out.glob("*.whl")):
        path.unlink()


def renew(package: Path, out: Path) -> None:
    """The package with a higher version, as if the next release had changed nothing else."""
    out.mkdir(exist_ok=True)
    tree = out / package.stem
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(tree)], check=True)
    control = tree / "DEBIAN" / "control"
    fields = control.read_text()
    found = re.search(r"^Version: (.*)$", fields, re.MULTILINE)
    assert found is not None
    control.write_text(fields.replace(found[1], f"{found[1]}+newer"))
    for metadata in tree.glob("usr/lib/ringstone/lib/python*/site-packages/ringstone-*.dist-info/METADATA"):
        metadata.write_text(re.sub(r"(?m)^Version: .*$", "Version: 99.0", metadata.read_text(), count=1))
    # Fast to make, and to unpack on an emulated CPU.
    subprocess.run(
        ["dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "--build", str(tree), f"{tree}.deb"], check=True
    )
    subprocess.run(["rm", "-r", str(tree)], check=True)
