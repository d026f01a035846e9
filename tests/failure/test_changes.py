"""Whatever an operator changes of a volume that is in use, on every type of pool, beside loads that know the content of
every block: what was acknowledged is there, and no guest sees an error."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest

from ringstone.client import GatewayClient
from ringstone.errors import BusyError
from tests.framework.gateway import GatewayProcess
from tests.framework.kinds import KINDS, MIB, SIZE, SNAPSHOT_KINDS, Volumes
from tests.framework.load import script, verify
from tests.framework.pattern import run_pattern, running_pattern

QUEUES = 4
CORES = sorted(os.sched_getaffinity(0))[:2]
READ_ALL = [{"op": "read", "offset": at, "len": MIB} for at in range(0, 8 * MIB, MIB)]


@pytest.fixture
def gateway() -> Iterator[GatewayProcess]:
    """With one reactor, which others may join."""
    with GatewayProcess("--no-balance", cores=CORES[:1]) as process:
        yield process.start()


@pytest.fixture(params=KINDS)
def volumes(gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Volumes]:
    with Volumes(gateway, request.param, request) as made:
        yield made


@contextmanager
def pattern(socket: str) -> Iterator[None]:
    """Overwrites at depth, each block with what it is and when it was written."""
    with running_pattern(socket, queues=QUEUES, depth=16) as load:
        yield
    report = load.report
    assert report.passed, report.findings
    assert (report.errors, report.missed_calls, report.reconnects) == (0, 0, 0)
    assert report.blocks_checked == report.blocks_written > 0


@contextmanager
def discards(socket: str) -> Iterator[None]:
    """Discards and zeroes among reads and writes, one run after another."""
    enough = threading.Event()
    runs: list[dict[str, Any]] = []

    def run() -> None:
        while not (enough.is_set() and runs):
            runs.append(verify(socket, queues=QUEUES, depth=8, operations=3_000, seed=len(runs)))
            assert runs[-1]["passed"], runs[-1]["findings"]

    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(run)
        try:
            yield
        finally:
            enough.set()
        load.result()
    assert sum(one["operations"]["discard"] for one in runs) > 0


def grow(client: GatewayClient) -> None:
    for step in range(1, 11):
        client.resize_volume("disk", SIZE + step * MIB)


def change_reactors(client: GatewayClient) -> None:
    """Queues go to a new reactor, the old one ends, and back."""
    first, second = CORES
    for here, there in ((first, second), (second, first)):
        client.add_reactor(there)
        for queue in (1, 3):
            # Between two runs of a load there is nothing to move.
            with suppress(BusyError):
                client.move_queue("disk", queue, there)
        client.remove_reactor(here)


def snapshots(client: GatewayClient, made: Volumes) -> None:
    """Taken, cloned, flattened and deleted."""
    for name in ("first", "second"):
        client.create_snapshot("disk", name)
    client.clone_snapshot("disk", "first", "copy")
    made.also("copy")
    client.delete_snapshot("disk", "second")
    assert verify(client.attach("copy").socket, operations=300)["passed"]
    client.flatten("copy")
    client.delete_snapshot("disk", "first")


@pytest.mark.skipif(len(CORES) < 2, reason="reactors change between two CPUs, and here is one")
@pytest.mark.parametrize("load", [pattern, discards])
def test_no_change_loses_anything(gateway: GatewayProcess, volumes: Volumes, load: Any) -> None:
    loading: AbstractContextManager[None] = load(volumes.serve(queues=QUEUES).socket)
    with loading:
        with gateway.client() as client:
            grow(client)
            change_reactors(client)
            if volumes.kind in SNAPSHOT_KINDS:
                snapshots(client, volumes)
        gateway.upgrade()
        with gateway.client() as client:
            client.resize_volume("disk", SIZE + 11 * MIB)


def content(socket: str) -> list[int]:
    return [one["crc32"] for one in script(socket, READ_ALL)]


def test_a_neighbour_that_comes_and_goes_changes_nothing(gateway: GatewayProcess, volumes: Volumes) -> None:
    """Volumes of the same pool, made, filled, and deleted, or put back to a snapshot."""
    load = pattern(volumes.serve(queues=QUEUES).socket)
    with load, gateway.client() as client:
        other = volumes.serve("other").socket
        assert verify(other, operations=500)["passed"]
        if volumes.kind in SNAPSHOT_KINDS:
            before = content(other)
            client.create_snapshot("other", "monday")
            assert run_pattern(other, queues=1, seconds=0.5).passed
            assert content(other) != before
            client.detach("other")
            client.revert("other", "monday")
            again = client.attach("other").socket
            assert content(again) == before
            client.delete_snapshot("other", "monday")
        client.detach("other", force=True)
        pool = client.volume("other").pool
        client.delete_volume("other")
        client.create_volume("other", pool=pool, size=SIZE)
        fresh = client.attach("other").socket
        assert all(one["zero"] for one in script(fresh, READ_ALL))
