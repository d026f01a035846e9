"""Builds a Debian system to boot in a guest, with systemd as its first process: an ext4 image made by mmdebstrap.

The guest image's kernel and initramfs start it: they mount the disk, put their agent beside it (guest-init.sh), and
hand over, so that `ringstone.hypervisor.guest.Guest` works with it as with any guest. The image itself is plain Debian.
It is never written to: a guest's changes go to a temporary file of QEMU's, which ends with it.

An image is kept under a key made of the suite, the packages and this recipe, so a second call only finds it, without
network. `python -m ringstone.hypervisor.debian_root [SUITE]` builds it and prints the path.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringstone.hypervisor.guest_image import default_cache
from ringstone.hypervisor.tools import GuestImageError, locked, run_tool

SUITE = "bookworm"
# systemd as init, its device manager, and what Ringstone's processes need beside what they bring.
PACKAGES = ("systemd", "systemd-sysv", "udev", "python3", "etcd-server")
# Of the image, not of what is in it: a sparse file, and guests' changes need room too.
IMAGE_BYTES = 2 << 30
SERIAL = "debian-root"
KERNEL_ARGUMENTS = f"ringstone.root={SERIAL} systemd.show_status=1"

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
# Services that would only compete with what is tried for an emulated CPU.
_MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "etcd.service",
    "fstrim.timer",
    "getty@.service",
    "serial-getty@.service",
)


@dataclass(frozen=True)
class DebianRoot:
    """A bootable root file system. `image` is shared by all guests and must not be written to."""

    suite: str
    image: Path

    def devices(self) -> list[str]:
        """QEMU's arguments for the disk; changes to it end with QEMU."""
        return disk_args(self.image, SERIAL, snapshot=True)


def disk_args(image: Path, serial: str, *, snapshot: bool = False, read_only: bool = False) -> list[str]:
    """QEMU's arguments for a raw file as a virtio disk, which the guest's udev calls
    /dev/disk/by-id/virtio-SERIAL."""
    flags = f"snapshot={'on' if snapshot else 'off'},readonly={'on' if read_only else 'off'}"
    return [
        *("-drive", f"if=none,id={serial},file={image},format=raw,{flags}"),
        *("-device", f"virtio-blk-pci,drive={serial},serial={serial}"),
    ]


def ensure_debian_root(
    suite: str = SUITE,
    *,
    packages: Sequence[str] = PACKAGES,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> DebianRoot:
    """The root file system of `suite` with `packages`, built if it is not in `cache`, which takes root, a mirror and
    most of a minute. Raises GuestImageError."""
    cache = cache or default_cache().parent / "debian"
    cache.mkdir(parents=True, exist_ok=True)
    image = cache / f"{suite}-{_key(suite, packages)}.ext4"
    with locked(cache / "lock"):
        if not image.exists():
            report(f"Building a root file system of Debian {suite}")
            _build(suite, packages, image)
            for older in cache.glob(f"{suite}-*.ext4"):
                if older != image:
                    older.unlink()
    return DebianRoot(suite, image)


def make_image(folder: Path, image: Path, size: int) -> None:
    """An ext4 image of `size` bytes at most, with what is in `folder`."""
    image.unlink(missing_ok=True)
    run_tool(
        ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(folder), str(image), f"{size >> 10}k"]
    )


def _key(suite: str, packages: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join((suite, *packages)).encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _build(suite: str, packages: Sequence[str], image: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise GuestImageError(
            "The program mmdebstrap is missing; run `apt-get install mmdebstrap` and try again."
        )
    if os.geteuid() != 0:
        raise GuestImageError("Making a Debian root file system takes root; run this as root, once.")
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="build-") as folder:
        root = Path(folder) / "root"
        run_tool(
            [
                *(
                    "mmdebstrap",
                    "--quiet",
                    "--mode=root",
                    "--variant=minbase",
                    f"--include={','.join(packages)}",
                ),
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT),
                *(suite, str(root), f"deb [signed-by={_KEYRING}] {_mirror()} {suite} main"),
            ]
        )
        _settle(root)
        whole = Path(folder) / "image"
        make_image(root, whole, IMAGE_BYTES)
        whole.rename(image)


def _settle(root: Path) -> None:
    """Answer what a first boot would ask or do."""
    # Any fixed one: without it systemd takes each boot for the first.
    machine = hashlib.sha256(SERIAL.encode()).hexdigest()[:32]
    (root / "etc/machine-id").write_text(f"{machine}\n")
    (root / "etc/hostname").write_text("debian\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost debian\n")
    for unit in _MASKED:
        place = root / "etc/systemd/system" / unit
        place.unlink(missing_ok=True)
        place.symlink_to("/dev/null")


def _mirror() -> str:
    """The one that this machine takes its own Debian from."""
    targets = run_tool(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(COMPONENT) $(ORIGIN) $(LABEL)",
            "Created-By: Packages",
        ]
    )
    for line in targets.splitlines():
        uri, _, rest = line.partition(" ")
        if rest == "main Debian Debian":
            return uri
    raise GuestImageError(
        "No apt source for Debian was found; add one to /etc/apt/sources.list, run `apt-get update`."
    )


def main(arguments: Sequence[str]) -> int:
    """The command line: the suite, bookworm by default."""
    try:
        root = ensure_debian_root(*arguments[:1], report=lambda step: print(step, flush=True))
    except GuestImageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Root  {root.image} ({root.image.stat().st_blocks >> 11} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
