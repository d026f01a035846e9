"""The choice between KVM and TCG, and how long it is remembered."""

from pathlib import Path

import pytest

from ringstone.hypervisor import accelerator
from ringstone.hypervisor.accelerator import Accelerator, choose_accelerator, probe_kvm
from ringstone.hypervisor.guest import GuestError
from ringstone.hypervisor.guest_image import GuestImage
from ringstone.hypervisor.qemu import QemuConfig, QemuError

IMAGE = GuestImage(Path("kernel"), Path("guest-1.initrd"), "6.1")
OTHER_IMAGE = GuestImage(Path("kernel"), Path("guest-2.initrd"), "6.1")


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[GuestImage]:
    asked: list[GuestImage] = []

    def probe(image: GuestImage) -> Accelerator:
        asked.append(image)
        return Accelerator("tcg", f"probe {len(asked)}")

    monkeypatch.setattr(accelerator, "probe_kvm", probe)
    return asked


def test_the_answer_is_remembered_for_this_image(tmp_path: Path, probes: list[GuestImage]) -> None:
    first = choose_accelerator(IMAGE, cache=tmp_path / "cache")
    assert choose_accelerator(IMAGE, cache=tmp_path / "cache") == first
    assert probes == [IMAGE]
    assert choose_accelerator(OTHER_IMAGE, cache=tmp_path / "cache").reason == "probe 2"


def test_a_restart_of_the_host_asks_again(
    tmp_path: Path, probes: list[GuestImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_accelerator(IMAGE, cache=tmp_path)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another boot")
    monkeypatch.setattr(accelerator, "_BOOT_ID", boot_id)
    choose_accelerator(IMAGE, cache=tmp_path)
    assert len(probes) == 2


def test_a_damaged_memory_is_asked_anew(tmp_path: Path, probes: list[GuestImage]) -> None:
    (tmp_path / "accelerator.json").write_text('{"key": ')
    assert choose_accelerator(IMAGE, cache=tmp_path).reason == "probe 1"


def test_what_was_asked_for_is_not_probed(tmp_path: Path, probes: list[GuestImage]) -> None:
    assert choose_accelerator(IMAGE, "kvm", cache=tmp_path).name == "kvm"
    assert probes == []


def test_without_the_device_it_is_tcg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    assert probe_kvm(IMAGE) == Accelerator("tcg", f"There is no {tmp_path}/kvm.")


@pytest.mark.parametrize(
    "error", [GuestError("The guest did not boot in time.\nconsole"), QemuError("QEMU ended.")]
)
def test_a_kvm_that_does_not_boot_a_guest_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_guest(config: QemuConfig, *, boot_timeout_s: float) -> None:
        assert config.accelerator == "kvm"
        assert boot_timeout_s <= 5
        raise error

    (tmp_path / "kvm").touch()
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(accelerator, "Guest", no_guest)
    chosen = probe_kvm(IMAGE)
    assert chosen.name == "tcg"
    assert chosen.reason.endswith(str(error).splitlines()[0])
