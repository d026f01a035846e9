"""Which version of QEMU is in question, and what it has."""

from pathlib import Path

import pytest

from ringstone.errors import InvalidError, NotFoundError
from ringstone.hypervisor.versions import DIFFERENCES, NEWEST, QemuVersion

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("7.2", QemuVersion(7, 2)),
        ("7.2.22", QemuVersion(7, 2)),
        ("QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)\nCopyright (c)", QemuVersion(10, 0)),
    ],
)
def test_a_version_is_read(text: str, version: QemuVersion) -> None:
    assert QemuVersion.parse(text) == version
    assert QemuVersion(9, 2) < QemuVersion(10, 0) < NEWEST


def test_what_is_no_version_is_refused() -> None:
    with pytest.raises(InvalidError, match="'new' is no version of QEMU; give one such as"):
        QemuVersion.parse("new")


def program(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_program_is_asked(tmp_path: Path) -> None:
    said = program(tmp_path, "echo QEMU emulator version 8.2.1")
    assert QemuVersion.of_program(said) == QemuVersion(8, 2)


@pytest.mark.parametrize("script", ["echo another 1.2", "exit 1"])
def test_a_program_that_is_not_qemu_is_refused(tmp_path: Path, script: str) -> None:
    with pytest.raises(InvalidError, match="does not say that it is QEMU"):
        QemuVersion.of_program(program(tmp_path, script))


def test_a_missing_program_is_told() -> None:
    with pytest.raises(NotFoundError, match="qemu-system-nowhere is missing"):
        QemuVersion.of_program("qemu-system-nowhere")


def test_the_guide_has_every_difference() -> None:
    guide = (ROOT / "docs/operations/guests.md").read_text()
    for difference in DIFFERENCES:
        assert f"| {difference.since} | {difference.what} | {difference.source} |" in guide
