"""Talking to the service manager, without one."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringstone.gateway.notify import sd_notify, watchdog_address


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def test_a_state_arrives(manager: socket.socket) -> None:
    sd_notify("READY=1")
    assert manager.recv(64) == b"READY=1"


def test_an_abstract_address_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"ringstone-test-{tmp_path}"[:100]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        receiver.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        sd_notify("STOPPING=1")
        assert receiver.recv(64) == b"STOPPING=1"


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    sd_notify("READY=1")


def test_a_manager_that_has_gone_is_no_error(
    manager: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    manager.close()
    sd_notify("STOPPING=1")
    assert "does not take STOPPING=1" in caplog.text


def test_a_manager_that_does_not_read_holds_nobody_up(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ringstone.gateway.notify._PATIENCE_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as filler:
        filler.connect(manager.getsockname())
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.send(b"WATCHDOG=1")
    sd_notify("READY=1")
    assert "does not take READY=1: timed out" in caplog.text


def test_the_watchdog_runs_at_half_the_allowed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    assert watchdog_address() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_address() is None
    monkeypatch.setenv("NOTIFY_SOCKET", "@manager")
    assert watchdog_address() == ("@manager", 15000)
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_address() is None
