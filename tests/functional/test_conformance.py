"""What every type of pool keeps to, whatever its medium: one suite for all of them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ringstone import models
from ringstone.errors import InvalidError
from tests.framework.gateway import GatewayProcess
from tests.framework.kinds import KINDS, MIB, SIZE, Volumes
from tests.framework.load import script, verify
from tests.framework.pattern import run_pattern, running_pattern

Serve = Callable[..., models.Attachment]


@pytest.fixture
def volumes(gateway: GatewayProcess, kind: str, request: pytest.FixtureRequest) -> Iterator[Volumes]:
    with Volumes(gateway, kind, request) as made:
        yield made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(volumes: Volumes) -> Serve:
    """Makes and attaches a volume in a pool of the kind."""
    return volumes.serve


@pytest.mark.parametrize(("queues", "block_size"), [(1, 512), (4, 4096)])
def test_what_was_written_is_what_is_read(serve: Serve, queues: int, block_size: int) -> None:
    volume = serve(queues=queues, block_size=block_size)
    report = verify(volume.socket, queues=queues, depth=8)
    assert report["passed"], report["findings"]
    assert report["blocks_checked"] > 0


def test_many_clients_each_find_their_own(serve: Serve) -> None:
    sockets = [serve(f"disk-{number}").socket for number in range(3)]
    with ThreadPoolExecutor() as pool:
        for report in pool.map(lambda socket: verify(socket, operations=600, depth=8), sockets):
            assert report["passed"], report["findings"]


def test_reads_return_the_last_acknowledged_write_at_depth(serve: Serve) -> None:
    report = run_pattern(serve(queues=4).socket, queues=4, depth=32, seconds=2)
    assert report.passed, report.findings
    assert report.operations.flush > 0


def test_a_new_volume_reads_as_zeroes(serve: Serve) -> None:
    reads = [{"op": "read", "offset": at, "len": 128 * 1024} for at in (0, SIZE // 2, SIZE - 128 * 1024)]
    assert all(one["zero"] for one in script(serve().socket, reads))


@pytest.mark.parametrize("operation", ["discard", "write_zeroes"])
def test_what_was_discarded_or_zeroed_reads_as_zeroes_to_the_block(serve: Serve, operation: str) -> None:
    """Ceph by itself passes over discards of less than 64 KiB."""
    volume = serve()
    whole = {"op": "write", "offset": 0, "len": 8 * MIB, "fill": {"seed": 3}}
    before = {"op": "read", "offset": 0, "len": 4096}
    after = {"op": "read", "offset": 3 * 4096, "len": 4096}
    gone = {"op": "read", "offset": 4096, "len": 2 * 4096}
    far = {"op": "read", "offset": 4 * MIB - 4096, "len": 3 * MIB}
    kept = script(volume.socket, [whole, before, after])
    steps = [
        {"op": operation, "offset": 4096, "len": 2 * 4096},
        {"op": operation, "offset": 4 * MIB - 4096, "len": 3 * MIB},
    ]
    found = script(volume.socket, [*steps, before, after, gone, far])
    assert [one["crc32"] for one in found[2:4]] == [one["crc32"] for one in kept[1:3]]
    assert found[4]["zero"]
    assert found[5]["zero"]


def test_flushed_content_outlives_a_killed_gateway(serve: Serve, gateway: GatewayProcess) -> None:
    volume = serve()
    write = {"op": "write", "offset": 4 * MIB, "len": 256 * 1024, "fill": {"seed": 5}}
    read = {"op": "read", "offset": 4 * MIB, "len": 256 * 1024}
    before = script(volume.socket, [write, {"op": "flush"}, read])[-1]["crc32"]
    gateway.kill()
    gateway.start()
    assert script(volume.socket, [read])[-1]["crc32"] == before


def test_a_volume_grows_while_it_is_used_and_never_shrinks(serve: Serve, gateway: GatewayProcess) -> None:
    volume = serve()
    write = {"op": "write", "offset": SIZE - 4096, "len": 4096, "fill": {"seed": 6}}
    read = {"op": "read", "offset": SIZE - 4096, "len": 4096}
    before = script(volume.socket, [write, read])[-1]["crc32"]
    with gateway.client() as client:
        client.resize_volume("disk", SIZE + 8 * MIB)
        with pytest.raises(InvalidError, match="cannot shrink"):
            client.resize_volume("disk", SIZE)
    new = {"op": "read", "offset": SIZE, "len": 8 * MIB}
    found = script(volume.socket, [read, new])
    assert found[0]["crc32"] == before
    assert found[1]["zero"]
    assert verify(volume.socket, operations=300)["passed"]


def test_no_write_is_lost_while_a_volume_grows(serve: Serve, gateway: GatewayProcess) -> None:
    """A volume in memory once found out anew, at each growth, which of its chunks had data, while writes went on: what
    was written meanwhile read as zeroes."""
    volume = serve(queues=4)
    with (
        running_pattern(volume.socket, queues=4, depth=16, span_bytes=SIZE) as load,
        gateway.client() as client,
    ):
        for step in range(1, 21):
            client.resize_volume("disk", SIZE + step * MIB)
    assert load.report.passed, load.report.findings
    assert load.report.blocks_checked == load.report.blocks_written > 0


def test_a_read_only_volume_is_read(serve: Serve, gateway: GatewayProcess) -> None:
    volume = serve()
    write = {"op": "write", "offset": 0, "len": 4096, "fill": {"seed": 9}}
    read = {"op": "read", "offset": 0, "len": 4096}
    before = script(volume.socket, [write, {"op": "flush"}, read])[-1]["crc32"]
    with gateway.client() as client:
        client.detach("disk")
        again = client.attach("disk", read_only=True)
    assert script(again.socket, [read])[-1]["crc32"] == before


@pytest.mark.soak
def test_days_of_use_in_minutes(serve: Serve, gateway: GatewayProcess) -> None:
    """Rounds of load, growth, restarts and upgrades, as a volume meets them in days."""
    volume = serve(queues=4)
    size = SIZE
    for round_number in range(10):
        report = run_pattern(volume.socket, queues=4, depth=32, seconds=10, seed=round_number)
        assert report.passed, report.findings
        report_of_all = verify(volume.socket, queues=4, depth=16, operations=5_000)
        assert report_of_all["passed"], report_of_all["findings"]
        size += 8 * MIB
        with gateway.client() as client:
            client.resize_volume("disk", size)
        (gateway.restart, gateway.upgrade)[round_number % 2]()
