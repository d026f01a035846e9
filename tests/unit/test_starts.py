"""Crashes in a row: when a start waits, and what makes it forget."""

import signal
import threading
from pathlib import Path

import pytest

from ringstone.gateway import starts as module
from ringstone.gateway.starts import Starts, hold_back, wait_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module, "_now", lambda: now[0])
    return now


def test_the_fourth_start_in_a_row_waits_and_each_further_one_twice_as_long() -> None:
    assert [wait_seconds(count) for count in range(1, 8)] == [0, 0, 0, 0.2, 0.4, 0.8, 1.6]
    assert wait_seconds(9) == 6.4
    assert {wait_seconds(count) for count in (10, 11, 5000)} == {10.0}


def test_starts_in_a_row_are_counted(tmp_path: Path, clock: list[float]) -> None:
    starts = Starts(tmp_path / "starts")
    counts = []
    for _ in range(4):
        counts.append(starts.count())
        clock[0] += 59
    assert counts == [1, 2, 3, 4]


def test_a_clean_stop_is_forgotten(tmp_path: Path, clock: list[float]) -> None:
    starts = Starts(tmp_path / "starts")
    assert (starts.count(), starts.count()) == (1, 2)
    starts.forget()
    assert starts.count() == 1
    starts.forget()
    starts.forget()


def test_enough_service_is_forgiven(tmp_path: Path, clock: list[float]) -> None:
    starts = Starts(tmp_path / "starts")
    assert (starts.count(), starts.count()) == (1, 2)
    clock[0] += 9
    starts.serving(2)
    clock[0] += 59.9
    assert starts.count() == 3  # the wait was no service
    clock[0] += 60
    assert starts.count() == 1


def test_another_boot_of_the_host_is_no_crash(tmp_path: Path, clock: list[float]) -> None:
    starts = Starts(tmp_path / "starts")
    starts.count()
    clock[0] = 5
    assert starts.count() == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"count": 2}', '{"count": "x", "at": 1}'])
def test_a_damaged_record_is_no_record(tmp_path: Path, clock: list[float], content: str) -> None:
    path = tmp_path / "starts"
    path.write_text(content)
    assert Starts(path).count() == 1


def test_a_start_too_many_waits_and_says_so(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    monkeypatch.setattr(module, "sd_notify", told.append)

    def wait(seconds: float) -> bool:
        told.append(f"waited {seconds:g}")
        return False

    monkeypatch.setattr(module, "_told_to_stop", wait)
    starts = Starts(tmp_path / "starts")
    assert [hold_back(starts) for _ in range(3)] == [True, True, True]
    assert (told, caplog.text) == ([], "")
    assert hold_back(starts)
    assert told == ["EXTEND_TIMEOUT_USEC=60200000", "waited 0.2"]
    assert "ended 3 times in a row" in caplog.text
    assert "waits 0.2 s" in caplog.text


def test_a_stop_ends_the_wait(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wait_seconds", lambda _: 60.0)
    this = threading.get_ident()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        signal.pthread_kill(this, signal.SIGTERM)
        assert not hold_back(Starts(tmp_path / "starts"))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
