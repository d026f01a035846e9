"""A gateway that dies under load: what it acknowledged is there, and what was in flight is served, once, when
it is back."""

import itertools
import signal
from typing import Any

import pytest

from ringstone.client import GatewayClient
from ringstone.stats import StatsPage
from tests.framework.gateway import GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.pattern import running_pattern


def crash(gateway: GatewayProcess) -> None:
    gateway.kill()
    gateway.start()


def restart(gateway: GatewayProcess) -> None:
    gateway.stop(signal.SIGTERM)
    gateway.start()


def runs(client: GatewayClient) -> bool:
    state = client.attachments()[0].state
    assert state != "needs_reset", "the rings were not taken up where they were"
    return state == "running"


# Memory volumes lie in /dev/shm, so they survive the process.
@pytest.mark.parametrize(
    ("kind", "end"),
    [
        *itertools.product(["memory", "file"], [crash, restart]),
        ("store", crash),
        ("sealed", crash),
        pytest.param("store", restart, marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="split"),
        pytest.param({"event_idx": False, "threads": 4}, id="split-without-event-idx"),
        pytest.param({"packed": True}, id="packed"),
        pytest.param({"depth": 1, "wait": "poll"}, id="one-request"),
    ],
)
def test_nothing_is_lost_or_done_twice(gateway: GatewayProcess, kind: str, end: Any, more: Any) -> None:
    volume = gateway.serve("disk", kind=kind, queues=4)
    with running_pattern(volume.socket, **more) as load:
        for _ in range(3):
            end(gateway)
            # start() returned with the sockets listening; the next round begins when the load runs on it.
            gateway.wait_for("the load to run on", runs)
    report = load.report
    assert report.passed, report.findings
    assert report.reconnects == 3
    assert report.missed_calls == 0
    assert report.blocks_checked == report.blocks_written > 0


def test_a_volume_that_loses_writes_in_a_crash_would_be_noticed(gateway: GatewayProcess) -> None:
    """Or the tests above would pass on a gateway that forgets: here the volume's file is put back to what it was
    before the crash."""
    volume = gateway.serve("disk", kind="file", queues=4)
    backing = gateway.state_dir / "pools/file/disk.raw"
    with running_pattern(volume.socket) as load, StatsPage(gateway.stats_path) as stats:
        gateway.wait_for(
            "many blocks to be written",
            lambda client: sum(queue.writes for queue in stats.read().of_volume("disk")) > 2_000,
        )
        gateway.kill()
        backing.write_bytes(bytes(backing.stat().st_size))
        gateway.start()
        gateway.wait_for("the load to run on", runs)
    assert not load.report.passed
    assert load.report.lost > 0
