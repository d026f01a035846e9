"""Two hosts want one volume: whoever has lost it writes not a byte more, whatever kept it from hearing of that."""

import contextlib
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.errors import RingstoneError
from ringstone.hypervisor.fio import FioJob, fio_command
from ringstone.lab.lab import Lab
from tests.framework.lab import wait_for
from tests.framework.pattern import MIB, run_pattern, running_pattern

SIZE = 16 * MIB
PATIENCE = {"stall_seconds": 90.0, "wait": "sleep"}
# After the old owner goes on: its requests in flight are sent at once, or never.
LATE_SECONDS = 2.0


@pytest.fixture
def disk(manager: RemoteClient) -> models.Attachment:
    manager.create_volume("disk", pool="ceph", size=SIZE)
    return manager.attach("disk", host="a", queues=2, ha=True)


@contextlib.contextmanager
def doomed_load(disk: models.Attachment) -> Iterator[None]:
    """Writes at depth to what will be lost; its backend never answers again, and so it ends by force."""
    load = running_pattern(disk.socket, queues=2, depth=32, span_bytes=SIZE, **PATIENCE)
    running = load.__enter__()
    try:
        yield
    finally:
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(RingstoneError):
            load.__exit__(None, None, None)


def content(lab: Lab, folder: Path) -> int:
    """Checksum of the whole image, read by nothing of ours."""
    target = folder / "exported"
    lab.ceph.rbd("export", "--no-progress", "rbd/disk", str(target))
    found = zlib.crc32(target.read_bytes())
    target.unlink()
    return found


def writes_at_a(lab: Lab) -> int:
    with lab.hosts["a"].client() as client:
        return sum(queue.writes for queue in client.stats(volume="disk").of_volume("disk"))


def on_b(manager: RemoteClient) -> models.Attachment | None:
    found = manager.attachment("disk")
    return found if (found.host, found.state) == ("b", "listening") else None


def write_anew(attachment: models.Attachment) -> None:
    report = run_pattern(
        attachment.socket, queues=2, depth=16, seconds=2, seed=2, span_bytes=SIZE, **PATIENCE
    )
    assert report.passed, report.findings
    assert report.blocks_checked > 0


def check_that_a_gives_up(lab: Lab, disk: models.Attachment) -> None:
    """It says why it has stopped, and nothing of it is left."""
    with lab.hosts["a"].client() as at_a:
        wait_for("a to let go", lambda: at_a.volume("disk").detail is None)
        said = [event.message for event in at_a.events(volume="disk")]
    assert any("not served here any more: host 'b' owns it since epoch" in message for message in said), said
    assert not Path(disk.socket).exists()


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.soak)])
def test_a_stopped_owner_that_goes_on_writes_nothing(
    lab: Lab, manager: RemoteClient, disk: models.Attachment, tmp_path: Path, seconds: int
) -> None:
    with doomed_load(disk):
        lab.hosts["a"].pause()
        try:
            begun = time.monotonic()
            taken = manager.attach("disk", host="b", queues=2, take_over=True)
            assert (taken.host, taken.epoch) == ("b", disk.epoch + 1)
            write_anew(taken)
            before = content(lab, tmp_path)
            time.sleep(max(0.0, begun + seconds - time.monotonic()))
        finally:
            lab.hosts["a"].resume()
        time.sleep(LATE_SECONDS)
        assert content(lab, tmp_path) == before
        check_that_a_gives_up(lab, disk)
    assert content(lab, tmp_path) == before
    write_anew(taken)


@contextlib.contextmanager
def stopped(lab: Lab, manager: RemoteClient) -> Iterator[None]:
    """Host a's gateway stands still while a person has host b take the volume over."""
    lab.hosts["a"].pause()
    try:
        manager.attach("disk", host="b", queues=2, take_over=True)
        yield
    finally:
        lab.hosts["a"].resume()


@contextlib.contextmanager
def cut_off(lab: Lab, manager: RemoteClient) -> Iterator[None]:
    """Host a reaches nobody, and a manager has host b take the volume over."""
    lab.hosts["a"].partition()
    try:
        wait_for("the failover", lambda: on_b(manager))
        yield
    finally:
        lab.hosts["a"].heal()


@pytest.mark.guest
@pytest.mark.parametrize("lose", [stopped, cut_off])
def test_the_guest_of_a_lost_host_writes_nothing(
    lab: Lab,
    manager: RemoteClient,
    disk: models.Attachment,
    tmp_path: Path,
    lose: Callable[[Lab, RemoteClient], AbstractContextManager[None]],
) -> None:
    """What is started anew on another host has the volume for itself, while the old guest still writes."""
    job = FioJob("verified", "randwrite", engine="libaio", depth=16, size=SIZE)
    with lab.boot("a", "disk") as lost:
        lost.start(fio_command(replace(job, seconds=600.0)) + "; touch /ended")
        wait_for("the guest to write", lambda: writes_at_a(lab) > 200)
        with lose(lab, manager), lab.boot("b", "disk") as guest:
            guest.fio(replace(job, verify="write"), timeout_s=120)
            before = content(lab, tmp_path)
        # Both have gone on: the host that lost it, and the guest there.
        check_that_a_gives_up(lab, disk)
        time.sleep(LATE_SECONDS)
        assert content(lab, tmp_path) == before
        # Its requests wait for a disk that does not come back. None was answered with an error.
        assert lost.output("[ ! -e /ended ] || echo ended; dmesg | grep 'I/O error' || true") == ""
    with lab.boot("b", "disk") as guest:
        guest.fio(replace(job, verify="only"), timeout_s=120)


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.soak)])
def test_a_host_that_was_cut_off_writes_nothing(
    lab: Lab, manager: RemoteClient, disk: models.Attachment, tmp_path: Path, seconds: int
) -> None:
    """Its gateway and its guest live on, with requests on the way to OSDs that they do not reach."""
    with doomed_load(disk):
        lab.hosts["a"].partition()
        try:
            begun = time.monotonic()
            taken = wait_for("the failover", lambda: on_b(manager))
            assert taken.epoch == disk.epoch + 1
            write_anew(taken)
            before = content(lab, tmp_path)
            time.sleep(max(0.0, begun + seconds - time.monotonic()))
        finally:
            lab.hosts["a"].heal()
        check_that_a_gives_up(lab, disk)
        time.sleep(LATE_SECONDS)
    assert content(lab, tmp_path) == before
    wait_for("a", lambda: manager.host("a").alive)
    # What is a's own way to Ceph is a new one.
    manager.detach("disk")
    write_anew(manager.attach("disk", host="a", queues=2))
