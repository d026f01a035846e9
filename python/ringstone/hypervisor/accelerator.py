"""Chooses KVM where a guest really boots under it, else TCG.

Some hosts expose a /dev/kvm that opens but cannot run a stock kernel, so the only honest probe is to boot
one: the guest image itself, for a few seconds at most. The answer holds until the host is rebooted, QEMU is
upgraded or the image changes.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ringstone.hypervisor.guest import Guest, GuestError
from ringstone.hypervisor.guest_image import GuestImage, default_cache
from ringstone.hypervisor.qemu import AcceleratorName, QemuConfig, QemuError
from ringstone.hypervisor.versions import QEMU

KVM_DEVICE = Path("/dev/kvm")
KVM_BOOT_TIMEOUT_S = 5.0  # a kernel that KVM runs is up in about one second
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Accelerator:
    """What runs the guest's code, and a sentence why."""

    name: AcceleratorName
    reason: str


def choose_accelerator(
    image: GuestImage,
    wanted: Literal["auto", "kvm", "tcg"] = "auto",
    *,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Accelerator:
    """The accelerator for guests on this host. `auto` boots a guest under KVM once and remembers the answer
    in `cache`."""
    if wanted != "auto":
        return Accelerator(wanted, "It was asked for.")
    remembered = (cache or default_cache()) / "accelerator.json"
    key = _probe_key(image)
    try:
        stored = json.loads(remembered.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not asked yet, or a half-written file
        stored = {}
    if stored.get("key") == key:
        return Accelerator(stored["name"], stored["reason"])
    report("Trying whether a guest boots under KVM")
    accelerator = probe_kvm(image)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    whole = remembered.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps({"key": key, **asdict(accelerator)}))
    whole.replace(remembered)
    return accelerator


def probe_kvm(image: GuestImage) -> Accelerator:
    """Boot the image under KVM; takes KVM_BOOT_TIMEOUT_S seconds at most, and a few milliseconds where it
    cannot work."""
    if not KVM_DEVICE.exists():
        return Accelerator("tcg", f"There is no {KVM_DEVICE}.")
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"{KVM_DEVICE} may not be opened by this user.")
    with tempfile.TemporaryDirectory(prefix="ringstone-kvm-") as folder:
        config = QemuConfig(image, "kvm", Path(folder), cpus=1)
        try:
            with Guest(config, boot_timeout_s=KVM_BOOT_TIMEOUT_S):
                return Accelerator("kvm", "A guest boots under KVM here.")
        except (GuestError, QemuError) as error:
            headline = str(error).splitlines()[0]
            return Accelerator("tcg", f"KVM opens here but a guest does not boot under it: {headline}")


def _probe_key(image: GuestImage) -> str:
    qemu = shutil.which(QEMU)
    digest = hashlib.sha256(_BOOT_ID.read_bytes())
    digest.update(f"{image.key} {qemu} {Path(qemu).stat().st_mtime_ns if qemu else 0}".encode())
    # Who asks, because another user may have no right to the device.
    digest.update(f" {os.geteuid()} {KVM_DEVICE.exists()}".encode())
    return digest.hexdigest()
