"""When a Debian root file system is made anew, and what a person hears who cannot make one."""

import os
import shutil
from pathlib import Path

import pytest

from ringstone.hypervisor import debian_root
from ringstone.hypervisor.debian_root import ensure_debian_root
from ringstone.hypervisor.tools import GuestImageError


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """Builds nothing; what would have been built."""
    built: list[tuple[str, tuple[str, ...]]] = []

    def build(suite: str, packages: tuple[str, ...], image: Path) -> None:
        built.append((suite, tuple(packages)))
        image.write_bytes(b"")

    monkeypatch.setattr(debian_root, "_build", build)
    return built


def test_one_is_built_per_suite_and_packages_and_then_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = stand_in(monkeypatch)
    first = ensure_debian_root(packages=("systemd",), cache=tmp_path)
    assert ensure_debian_root(packages=("systemd",), cache=tmp_path) == first
    assert built == [("bookworm", ("systemd",))]
    other = ensure_debian_root("trixie", packages=("systemd",), cache=tmp_path)
    assert first.image.exists()
    newer = ensure_debian_root(packages=("systemd", "fio"), cache=tmp_path)
    assert len({first.image, other.image, newer.image}) == 3
    assert not first.image.exists(), "one of another recipe takes its place"
    assert other.image.exists()


def test_who_may_not_make_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/mmdebstrap")
    with pytest.raises(GuestImageError, match="takes root"):
        ensure_debian_root(cache=tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(GuestImageError, match="apt-get install mmdebstrap"):
        ensure_debian_root(cache=tmp_path)
    assert not list(tmp_path.glob("*.ext4"))


def test_guests_share_an_image_that_none_of_them_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    drive = ensure_debian_root(cache=tmp_path).devices()[1]
    assert "snapshot=on" in drive
