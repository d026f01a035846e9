"""Load with a pattern in every block: what it must pass, and what it must not let pass."""

from typing import Any

import pytest

from ringstone.client import GatewayClient
from ringstone.errors import RingstoneError
from ringstone.models import Faults, PoolCreate
from tests.framework.gateway import GatewayProcess
from tests.framework.pattern import MIB, run_pattern, running_pattern


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("more", [{}, {"threads": 4, "event_idx": False}], ids=["one thread", "four threads"])
def test_every_read_returns_what_was_written(
    gateway: GatewayProcess, kind: str, more: dict[str, Any]
) -> None:
    volume = gateway.serve("disk", kind=kind, queues=4)
    report = run_pattern(volume.socket, windows=True, **more)
    assert report.passed, report.findings
    assert report.findings == []
    assert min(report.operations.read, report.operations.write, report.operations.flush) > 0
    assert report.reads_checked > 0
    assert report.blocks_checked == report.blocks_written > 0
    assert report.inflight_region
    assert (report.reconnects, report.missed_calls) == (0, 0)
    assert len(report.queue_gaps_ns) == 4
    assert max(report.queue_gaps_ns) >= report.longest_gap_ns > 0
    operations = sum(report.operations.model_dump().values())
    assert report.latency.count == operations == sum(report.throughput_windows or [])


def test_a_second_run_with_the_same_seed_is_not_taken_for_the_first(gateway: GatewayProcess) -> None:
    volume = gateway.serve("disk", queues=4)
    for _ in range(2):
        report = run_pattern(volume.socket, seconds=0.3, wait="poll")
        assert report.passed, report.findings


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        ("lost_per_million", {"lost"}),
        ("torn_per_million", {"torn"}),
        ("error_per_million", {"errors"}),
    ],
)
def test_faults_are_found_and_told_apart(fault: str, kinds: set[str]) -> None:
    """Or the tests above would pass on a volume that loses data."""
    with GatewayProcess(test_pools=True) as testing:
        testing.start()
        with testing.client() as client:
            faults = Faults.model_validate({"seed": 3, fault: 20_000})
            path = str(testing.memory / "faulty")
            client.create_pool(PoolCreate(name="faulty", type="faulty", path=path, faults=faults))
            client.create_volume("disk", pool="faulty", size=64 * MIB, block_size=512)
            # Each block is written and read many times, so that no lost write is a block's first.
            report = run_pattern(client.attach("disk", queues=2).socket, queues=2)
    assert not report.passed
    counts = report.model_dump(include={"errors", "lost", "wrong", "torn", "doubled", "stuck"})
    assert {kind for kind, count in counts.items() if count > 0} == kinds, report.findings
    assert 0 < len(report.findings) <= 20


def test_the_load_ends_when_it_is_released(gateway: GatewayProcess) -> None:
    volume = gateway.serve("disk", queues=4)
    with running_pattern(volume.socket, rate=2000) as running:
        pass
    report = running.report
    assert report.passed, report.findings
    assert report.seconds < 600
    assert 4 <= sum(report.operations.model_dump().values()) <= 2000 * report.seconds + 4


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_load_goes_on_over_a_restart_of_the_gateway(gateway: GatewayProcess, kind: str) -> None:
    volume = gateway.serve("disk", kind=kind, queues=4)
    with running_pattern(volume.socket) as running:
        for _ in range(2):
            gateway.restart()
            gateway.wait_for("the load to be back", load_is_back)
    report = running.report
    assert report.passed, report.findings
    assert report.reconnects == len(report.outages) == 2
    for outage in report.outages:
        assert any(
            gap.start_ns < outage.start_ns + outage.duration_ns
            and outage.start_ns < gap.start_ns + gap.duration_ns
            for gap in report.gaps
        )
    assert report.blocks_checked == report.blocks_written > 0


def load_is_back(client: GatewayClient) -> bool:
    return client.attachments()[0].state == "running"


def test_a_gateway_that_forgets_what_it_acknowledged_is_noticed(gateway: GatewayProcess) -> None:
    """Or the test above would pass on one."""
    volume = gateway.serve("disk", kind="file", queues=4)
    with running_pattern(volume.socket) as running:
        gateway.stop()
        backing = gateway.state_dir / "pools/file/disk.raw"
        backing.write_bytes(bytes(backing.stat().st_size))
        gateway.start()
        gateway.wait_for("the load to be back", load_is_back)
    assert not running.report.passed
    assert running.report.lost > 0
    assert running.report.reconnects == 1


def test_what_the_gateway_does_not_offer_is_named(gateway: GatewayProcess) -> None:
    volume = gateway.serve("disk", queues=2)
    with pytest.raises(RingstoneError, match="offers 2 queue"):
        run_pattern(volume.socket, queues=3)
