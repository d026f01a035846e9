"""What the gateway's logic brings back after its process, or the host, has gone."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ringstone.errors import (
    BusyError,
    FailedError,
)
from ringstone.gateway.undo import UndoLater
from ringstone.pools.directory import Directory
from tests.framework.service import Host
from tests.framework.service import host as host

MIB = 1 << 20


def test_everything_is_served_again_after_a_restart(host: Host) -> None:
    host.pool("file")
    host.pool("memory", "m")
    for name, pool in (("a", "p"), ("b", "m"), ("c", "p")):
        host.service.volumes.create(name, pool, MIB, 512)
    kept = [host.service.attach("a", queues=3, read_only=True), host.service.attach("b")]
    host.crash_and_restart()
    assert host.store.attachments() == kept
    assert [(one.volume, one.socket, len(one.queues)) for one in host.engine.attachments()] == [
        ("a", kept[0].socket, 3),
        ("b", kept[1].socket, 2),
    ]
    assert [volume.read_only for volume in host.engine.volumes()] == [True, False]
    assert host.levels() == []


class Killed(BaseException):
    """The process ends here: nothing is undone."""


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["the backing", "the state", "the engine"])
def test_a_volume_is_whole_wherever_its_growth_was_cut_short(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str, after: bool, step: str
) -> None:
    """The state once knew the new size before the backing had it. The volume did not open any more, and the message
    advised to delete it, though all its data was there."""
    host.pool(kind)
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")

    def cut_short(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: Any, **named: Any) -> None:
            if after:
                real(*given, **named)
            raise Killed

        return call

    @contextmanager
    def no_undo(*_given: object, **_named: object) -> Iterator[UndoLater]:
        yield lambda what, undo: None

    owner, method = {
        "the backing": (Directory, "resize"),
        "the state": (type(host.store), "set_volume_size"),
        "the engine": (type(host.engine), "resize_volume"),
    }[step]
    with monkeypatch.context() as patched:
        patched.setattr("ringstone.gateway.volumes.undoing", no_undo)
        patched.setattr(owner, method, cut_short(getattr(owner, method)))
        with pytest.raises(Killed):
            host.service.volumes.resize("v", 2 * MIB)
    host.crash_and_restart()
    assert host.levels() == []
    assert [one.volume for one in host.engine.attachments()] == ["v"]
    if host.store.volume("v").size == MIB:
        host.service.volumes.resize("v", 2 * MIB)
    assert (host.store.volume("v").size, host.engine.volumes()[0].size) == (2 * MIB, 2 * MIB)


def test_a_file_in_memory_that_is_missing_is_zeroes_only_after_a_boot(host: Host) -> None:
    """A guest that runs on would be told zeroes where its data was."""
    host.pool("memory")
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.crash_and_restart()
    backing = host.memory / "p/v.raw"
    backing.unlink()
    host.crash_and_restart()
    assert not backing.exists()
    assert (
        "has not booted since" in str(host.service.attachment_failure("v")) or not host.engine.attachments()
    )
    assert ("error", "v") in host.levels()
    (host.root / "boot").write_text("another boot's id\n")
    host.crash_and_restart()
    assert backing.read_bytes() == bytes(MIB)
    assert host.levels() == [("warning", "v")]
    assert [one.volume for one in host.engine.attachments()] == ["v"]


def test_a_missing_backing_fails_its_volume_and_no_other(host: Host) -> None:
    host.pool()
    for name in ("a", "b", "c"):
        host.service.volumes.create(name, "p", MIB, 512)
        host.service.attach(name)
    lost = host.root / "pools/p/b.raw"
    away = lost.rename(host.root / "away")
    host.crash_and_restart()
    assert [one.volume for one in host.engine.attachments()] == ["a", "c"]
    reason = host.service.volumes.failure(host.store.volume("b"), host.service.pools.reach("p"))
    assert reason is not None
    assert str(lost) in reason
    assert host.service.attachment_failure("b") is not None
    assert ("error", "b") in host.levels()
    # A retry fails as well and keeps what is known; with the backing back it succeeds.
    before = host.store.attachment("b")
    with pytest.raises(FailedError):
        host.service.attach("b")
    assert host.store.attachment("b") == before
    assert host.service.attachment_failure("b") is not None
    away.rename(lost)
    host.service.attach("b")
    assert host.service.attachment_failure("b") is None
    assert len(host.engine.attachments()) == 3


def test_a_failed_volume_can_be_detached_and_deleted(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    os.unlink(host.root / "pools/p/v.raw")
    host.crash_and_restart()
    host.service.detach("v")
    host.service.volumes.delete("v")
    host.service.pools.delete("p")
    assert host.store.pools() == []


def test_one_engine_failure_does_not_stop_the_restart(host: Host) -> None:
    host.pool()
    for name in ("a", "b"):
        host.service.volumes.create(name, "p", MIB, 512)
        host.service.attach(name)
    host.store.close()
    again = Host.boot(host.root, host.memory)
    again.engine.before = lambda call: 1 / 0 if call == "attach a" else None  # type: ignore[assignment]
    again.service.restore()
    assert [one.volume for one in again.engine.attachments()] == ["b"]
    assert "ZeroDivisionError" in (again.service.attachment_failure("a") or "")
    again.store.close()


def test_memory_lost_with_the_host_is_made_anew_and_told(host: Host) -> None:
    host.pool("memory")
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    shutil.rmtree(host.memory / "p")
    host.crash_and_restart()
    assert [one.volume for one in host.engine.attachments()] == ["v"]
    assert host.levels() == [("warning", "v")]
    assert "is gone" in host.events.latest(1)[0].message


def test_a_backing_in_use_is_waited_for_and_holds_up_no_other(host: Host) -> None:
    """A killed gateway's locks last until the kernel has finished its I/O; its successor gave such volumes up."""
    host.pool()
    for name in ("a", "b"):
        host.service.volumes.create(name, "p", MIB, 512)
        host.service.attach(name)
    host.store.close()
    again = Host.boot(host.root, host.memory)
    tries = []

    def before(call: str) -> None:
        if call == "open_volume a":
            tries.append(call)
            if len(tries) <= 3:
                raise BusyError("a.raw is in use by another process.")

    again.engine.before = before
    again.service.restore()
    assert [one.volume for one in again.engine.attachments()] == ["b"]
    assert again.service.waits_for_backings
    assert "in use" in (again.service.attachment_failure("a") or "")
    again.service.wait_for_backings(60, threading.Event())
    assert sorted(one.volume for one in again.engine.attachments()) == ["a", "b"]
    assert again.service.attachment_failure("a") is None
    assert again.levels() == [("warning", "a")]
    assert "Served after" in again.events.latest(1)[0].message
    again.store.close()


@pytest.mark.parametrize("how", ["time is up", "the gateway stops", "a person detaches"])
def test_a_backing_that_stays_in_use_ends_the_wait(host: Host, how: str) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.store.close()
    again = Host.boot(host.root, host.memory)
    stop = threading.Event()

    def before(call: str) -> None:
        if call == "open_volume v":
            raise BusyError("v.raw is in use by another process.")

    again.engine.before = before
    again.service.restore()
    if how == "the gateway stops":
        stop.set()
    if how == "a person detaches":
        again.service.detach("v")
    again.service.wait_for_backings(0 if how == "time is up" else 60, stop)
    failed = again.service.attachment_failure("v")
    assert (failed is None) == (how == "a person detaches")
    errors = [event.message for event in again.events.latest(10) if event.level == "error"]
    assert [message[:24] for message in errors] == (
        ["The volume is not served"] if how == "time is up" else []
    )
    again.store.close()
