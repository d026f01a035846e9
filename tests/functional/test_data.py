"""Data through a real gateway, checked by a client that shares no code with it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from ringstone.models import Faults, PoolCreate
from tests.framework.gateway import GatewayProcess
from tests.framework.load import script, verify

MIB = 1 << 20


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_content_stays_over_a_restart_of_the_gateway(gateway: GatewayProcess, kind: str) -> None:
    volume = gateway.serve("disk", kind=kind)
    write = {"op": "write", "offset": 8 * 4096, "len": 64 * 1024, "fill": {"seed": 7}}
    read = {"op": "read", "offset": 8 * 4096, "len": 64 * 1024}
    before = script(volume.socket, [write, {"op": "flush"}, read])
    gateway.restart()
    after = script(volume.socket, [read])
    assert after[-1]["crc32"] == before[-1]["crc32"]
    assert not after[-1]["zero"]


@pytest.mark.parametrize("fault", ["lost_per_million", "torn_per_million", "error_per_million"])
def test_faults_are_noticed(fault: str) -> None:
    """Or the tests above would pass on a volume that loses data."""
    with GatewayProcess(test_pools=True) as testing:
        testing.start()
        with testing.client() as client:
            faults = Faults.model_validate({"seed": 3, fault: 200_000})
            path = str(testing.memory / "faulty")
            client.create_pool(PoolCreate(name="faulty", type="faulty", path=path, faults=faults))
            client.create_volume("disk", pool="faulty", size=64 * MIB, block_size=512)
            report = verify(client.attach("disk").socket, queues=1)
    assert not report["passed"]


def test_volumes_that_come_and_go_disturb_no_other(gateway: GatewayProcess) -> None:
    staying = gateway.serve("staying", kind="memory", queues=2)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(verify, staying.socket, queues=2, operations=20_000)
        with gateway.client() as client:
            for round_number in range(5):
                name = f"passing-{round_number}"
                passing = gateway.serve(name, kind="file", size=4 * MIB)
                assert verify(passing.socket, operations=100)["passed"]
                client.resize_volume(name, 5 * MIB)
                client.detach(name)
                client.delete_volume(name)
        report = running.result()
    assert report["passed"], report["findings"]
    assert report["failed_requests"] == 0
