"""The versions of QEMU and of the guest's kernel that tests run, as scripts/qemus puts them in place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ringstone.hypervisor.guest_image import GuestImage, ensure_guest_image
from ringstone.hypervisor.qemu import Qemu

CACHE = Path(__file__).resolve().parents[2] / ".cache"
QEMUS = ("7.2", "10.0", "11.1")
KERNELS = ("6.1", "6.12", "7.3")


def program(qemu: str) -> Path:
    """The QEMU of version `qemu`."""
    return _made(CACHE / "qemus" / qemu)


def image(kernel: str) -> GuestImage:
    """The guest image with the kernel of version `kernel`."""
    return ensure_guest_image(kernel_tree=_made(CACHE / "kernels" / kernel))


def _made(path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("Programs of another Debian suite run in a chroot, which takes root.")
    assert path.exists(), f"{path} is missing; run `make qemus`"
    return path


@contextmanager
def nothing_deprecated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where a QEMU that this process runs says that it was told something deprecated."""
    said: list[str] = []
    stop = Qemu.stop

    def stop_and_look(self: Qemu) -> None:
        stop(self)
        lines = self.output_log.read_text(errors="replace").splitlines()
        said.extend(line for line in lines if "deprecated" in line)

    monkeypatch.setattr(Qemu, "stop", stop_and_look)
    yield
    assert said == []
