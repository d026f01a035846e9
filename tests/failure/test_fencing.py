"""Two hosts want one volume: whoever has lost it writes not a byte more, whatever kept it from hearing of that."""

import contextlib
import os
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.errors import RingstoneError
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
