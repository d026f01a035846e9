"""The power goes, and a drive loses what it had not flushed: whatever a guest was told to be durable is there, and
nothing of what an operator was told to be done is half there."""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ringstone.client import GatewayClient
from ringstone.models import Attachment, PoolCreate
from tests.framework.chance import chance as chance
from tests.framework.gateway import GatewayProcess
from tests.framework.load import script
from tests.framework.pattern import MIB, RunningPattern, running_pattern
from tests.framework.volatile import VolatileDirectory

QUEUES = 4
# How long after the load runs again the power goes.
LATEST_SECONDS = 0.3
MORE_ROUNDS = 20
BACK: dict[str, Any] = {"flush_share": 5}
THROUGH: dict[str, Any] = {"flush_share": 0, "write_through": True}


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[VolatileDirectory]:
    with VolatileDirectory(tmp_path) as directory:
        yield directory


@pytest.fixture
def gateway(drive: VolatileDirectory) -> Iterator[GatewayProcess]:
    """Its state is on another drive."""
    with GatewayProcess() as process:
        yield process.start()


def serve(gateway: GatewayProcess, drive: VolatileDirectory, **more: Any) -> Attachment:
    with gateway.client() as client:
        client.create_pool(PoolCreate(name="file", type="file", path=str(drive.path)))
    return gateway.serve("disk", kind="file", **more)


def lose_power(gateway: GatewayProcess, drive: VolatileDirectory) -> int:
    """How many changes were lost."""
    gateway.kill()
    lost = drive.lose_power()
    gateway.forget_starts()
    gateway.start()
    return lost


def runs_on(client: GatewayClient) -> bool:
    state = client.attachments()[0].state
    assert state != "needs_reset", "the rings were not taken up where they were"
    queues = client.stats(volume="disk").of_volume("disk")
    return len(queues) == QUEUES and all(queue.writes for queue in queues)


@contextmanager
def load_through_losses(
    gateway: GatewayProcess, drive: VolatileDirectory, rounds: int, chance: random.Random, **more: Any
) -> Iterator[list[int]]:
    """The load after that many losses, and what each of them took. With a write cache there are more of them until one
    took something: the drive may have just been flushed each time."""
    lost: list[int] = []
    most = rounds if more.get("write_through") else rounds + MORE_ROUNDS
    volume = serve(gateway, drive, queues=QUEUES)
    with running_pattern(volume.socket, queues=QUEUES, volatile=True, **more) as load:
        while len(lost) < rounds or (len(lost) < most and not any(lost)):
            gateway.wait_for("the load to run on", runs_on)
            time.sleep(chance.uniform(0, LATEST_SECONDS))
            lost.append(lose_power(gateway, drive))
        gateway.wait_for("the load to run on", runs_on)
        yield lost
    sound(load)


def sound(load: RunningPattern) -> None:
    report = load.report
    assert report.passed, report.findings
    assert report.errors == report.lost == report.doubled == report.stuck == 0
    assert report.blocks_checked > 0


@pytest.mark.parametrize(
    ("mode", "ring", "rounds"),
    [
        pytest.param(BACK, {"packed": False}, 3, id="write-back-split"),
        pytest.param(THROUGH, {"packed": True}, 3, id="write-through-packed"),
        *(
            pytest.param(mode, ring, 100, id=f"{name}-long", marks=pytest.mark.soak)
            for name, mode, ring in (
                ("write-back-split", BACK, {"packed": False}),
                ("write-back-packed", BACK, {"packed": True}),
                ("write-through-split", THROUGH, {"packed": False}),
                ("write-through-packed", THROUGH, {"packed": True}),
            )
        ),
    ],
)
def test_what_was_promised_outlives_the_power(
    gateway: GatewayProcess,
    drive: VolatileDirectory,
    chance: random.Random,
    mode: dict[str, Any],
    ring: dict[str, Any],
    rounds: int,
) -> None:
    with load_through_losses(gateway, drive, rounds, chance, **mode, **ring) as lost:
        # Or there was nothing to lose, and nothing to see.
        assert any(lost) or mode is THROUGH
        gateway.upgrade()
        lose_power(gateway, drive)
        gateway.wait_for("the load to run on", runs_on)


@pytest.mark.parametrize("mode", [BACK, THROUGH], ids=["write-back", "write-through"])
def test_files_of_fuse_that_are_open_for_direct_io_are_synced(
    tmp_path: Path, chance: random.Random, mode: dict[str, Any]
) -> None:
    """There the kernel passes over RWF_DSYNC."""
    with ExitStack() as stack:
        drive = stack.enter_context(VolatileDirectory(tmp_path, direct_io=True))
        gateway = stack.enter_context(GatewayProcess()).start()
        with load_through_losses(gateway, drive, 2, chance, **mode):
            pass


@pytest.mark.parametrize("mode", [BACK, THROUGH], ids=["write-back", "write-through"])
def test_a_flush_that_does_nothing_is_noticed(
    gateway: GatewayProcess, drive: VolatileDirectory, chance: random.Random, mode: dict[str, Any]
) -> None:
    """Or the tests above would pass on a gateway that does not flush."""
    volume = serve(gateway, drive, queues=QUEUES)
    with running_pattern(volume.socket, queues=QUEUES, volatile=True, **mode) as load:
        gateway.wait_for("the load to run", runs_on)
        drive.ignore_syncs()
        time.sleep(0.5)
        assert lose_power(gateway, drive) > 0
        gateway.wait_for("the load to run on", runs_on)
    assert not load.report.passed
    assert load.report.lost > 0


def test_each_flush_reaches_the_drive(gateway: GatewayProcess, drive: VolatileDirectory) -> None:
    volume = serve(gateway, drive)
    write = {"op": "write", "offset": 0, "len": 4096, "fill": {"seed": 1}}
    before = drive.syncs()
    script(volume.socket, [write] * 7)
    assert drive.syncs() == before
    script(volume.socket, [write, {"op": "flush"}] * 7)
    assert drive.syncs() == before + 7
    # What nobody has flushed is lost.
    script(volume.socket, [write])
    assert lose_power(gateway, drive) > 0


def test_what_an_operator_has_done_outlives_the_power(
    gateway: GatewayProcess, drive: VolatileDirectory
) -> None:
    volume = serve(gateway, drive, size=16 * MIB)
    lose_power(gateway, drive)
    read = {"op": "read", "offset": 0, "len": 4096}
    assert script(volume.socket, [read])[0]["zero"]
    with gateway.client() as client:
        client.resize_volume("disk", 32 * MIB)
    lose_power(gateway, drive)
    assert script(volume.socket, [read | {"offset": 32 * MIB - 4096}])[0]["zero"]
    with gateway.client() as client:
        client.detach("disk")
        client.delete_volume("disk")
    lose_power(gateway, drive)
    with gateway.client() as client:
        assert client.volumes() == []
        client.create_volume("disk", pool="file", size=16 * MIB)
        assert client.health().status == "ok"
