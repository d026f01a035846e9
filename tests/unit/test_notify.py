"""Talking to the service manager, without one."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringstone.gateway.notify import Watchdog, sd_notify, watchdog_interval
from ringstone.stats import StatsPage
from tests.framework import stats_vector


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


def test_the_watchdog_runs_at_half_the_allowed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert watchdog_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_interval() == 15
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval() is None


def test_a_polling_reactor_that_does_not_turn_is_not_alive(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    path.write_bytes(stats_vector.golden_page())

    def turn(reactor: int, turns: int) -> None:
        with path.open("r+b") as file:
            file.seek(stats_vector.REACTORS_AT + 256 * reactor + 32)
            file.write(struct.pack("<Q", turns))

    with StatsPage(path) as page:
        watchdog = Watchdog(page, 15)
        assert watchdog.alive()
        # Reactor 0 polls and stands still; that reactor 1, asleep, stands still too is as it should be.
        assert not watchdog.alive()
        turn(0, 5)
        assert watchdog.alive()
        assert not watchdog.alive()


def test_the_watchdog_sends_signs_of_life_and_stops(manager: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    path.write_bytes(stats_vector.golden_page())
    with StatsPage(path) as page:
        watchdog = Watchdog(page, 0.001)
        watchdog.start()
        assert manager.recv(64) == b"WATCHDOG=1"
        watchdog.stop()
        assert not watchdog.is_alive()
