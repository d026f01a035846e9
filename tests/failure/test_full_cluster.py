"""A Ceph pool without room: what is written waits, what is read does not, and no error reaches the guest."""

import time
from collections.abc import Callable

import pytest

from ringstone import models
from ringstone.lab.ceph import CephCluster
from tests.framework.gateway import GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.load import script
from tests.framework.pattern import MIB, running_pattern

SMALL = "small"
WAITS_SECONDS = 2.0
READ = {"op": "read", "offset": 0, "len": 4096}

Fill = Callable[[CephCluster, bool], None]


def quota(ceph: CephCluster, full: bool) -> None:
    ceph.set_quota(SMALL, 1 if full else 0)
    ceph.wait_pool_full(SMALL, full=full)


def ratio(ceph: CephCluster, full: bool) -> None:
    """As if the OSDs' disks were full."""
    ceph.set_full(full)


@pytest.mark.parametrize("fill", [quota, ratio])
def test_writes_to_a_full_pool_wait_for_room(ceph: CephCluster, gateway: GatewayProcess, fill: Fill) -> None:
    ceph.create_pool(SMALL, size=2)
    where = models.RbdOptions(
        conf=str(ceph.conf_path),
        user="client.admin",
        keyring=str(ceph.keyring_path("admin")),
        ceph_pool=SMALL,
    )
    try:
        with gateway.client() as client:
            client.create_pool(models.PoolCreate(name="ceph", type="rbd", rbd=where))
            for name in ("written", "read"):
                client.create_volume(name, pool="ceph", size=16 * MIB)
            written, read = (client.attach(name, queues=1) for name in ("written", "read"))

            def requests() -> int:
                (queue,) = client.stats(volume="written").of_volume("written")
                assert queue.errors == 0
                return queue.reads + queue.writes

            with running_pattern(written.socket, queues=1, depth=16, wait="sleep", stall_seconds=60) as load:
                fill(ceph, True)
                try:
                    # The client hears of it within moments; then each of its slots has a write that waits.
                    time.sleep(WAITS_SECONDS)
                    stalled = requests()
                    time.sleep(WAITS_SECONDS)
                    assert requests() == stalled
                    assert script(read.socket, [READ])[0]["zero"]
                finally:
                    fill(ceph, False)
                gateway.wait_for("the load to run on", lambda _: requests() > stalled + 100)
            assert load.report.passed, load.report.findings
            assert load.report.blocks_checked == load.report.blocks_written > 0
            for name in ("written", "read"):
                client.detach(name)
                client.delete_volume(name)
    finally:
        ceph.delete_pool(SMALL)
    ceph.wait_healthy()
