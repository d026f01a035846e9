"""Snapshots and clones on every type of pool that has them, with the same words and the same errors."""

from collections.abc import Iterator

import pytest

from ringstone.client import GatewayClient
from ringstone.errors import BusyError, ExistsError, InvalidError, NotFoundError, UnsupportedError
from tests.framework.gateway import GatewayProcess
from tests.framework.kinds import MIB, SIZE, SNAPSHOT_KINDS, Volumes
from tests.framework.load import script, verify

WRITE = {"op": "write", "offset": 8 * 4096, "len": 64 * 1024, "fill": {"seed": 7}}
READ = {"op": "read", "offset": 8 * 4096, "len": 64 * 1024}


@pytest.fixture(params=SNAPSHOT_KINDS)
def volumes(gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Volumes]:
    with Volumes(gateway, request.param, request) as made:
        yield made


@pytest.fixture
def stored(gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[Volumes]:
    """What only a store has."""
    with Volumes(gateway, "store", request) as made:
        yield made


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[GatewayClient]:
    with gateway.client() as client:
        yield client


def write(socket: str, seed: int) -> int:
    """The checksum of what is read then."""
    return int(script(socket, [WRITE | {"fill": {"seed": seed}}, READ])[-1]["crc32"])


def read(socket: str) -> int:
    return int(script(socket, [READ])[-1]["crc32"])


def test_a_snapshot_keeps_what_was_written_before_it(volumes: Volumes, client: GatewayClient) -> None:
    socket = volumes.serve("disk").socket
    before = write(socket, 7)
    client.create_snapshot("disk", "monday")
    assert [snapshot.name for snapshot in client.snapshots("disk")] == ["monday"]
    with pytest.raises(ExistsError):
        client.create_snapshot("disk", "monday")
    assert write(socket, 8) != before
    clone = client.clone_snapshot("disk", "monday", "disk-clone")
    volumes.also("disk-clone")
    assert clone.size == SIZE
    copy = client.attach("disk-clone").socket
    assert read(copy) == before
    with pytest.raises(BusyError):
        client.revert("disk", "monday")
    client.detach("disk")
    client.revert("disk", "monday")
    assert read(client.attach("disk").socket) == before
    client.flatten("disk-clone")
    assert read(copy) == before
    assert verify(copy, operations=500)["passed"]


def test_what_still_stands_on_something_keeps_it(volumes: Volumes, client: GatewayClient) -> None:
    volumes.serve("disk")
    client.create_snapshot("disk", "monday")
    client.clone_snapshot("disk", "monday", "clone")
    volumes.also("clone")
    if volumes.kind == "rbd":
        # Ceph keeps what clones need of it by itself (clone format 2), and the image with it.
        client.delete_snapshot("disk", "monday")
        assert client.snapshots("disk") == []
    else:
        with pytest.raises(BusyError):
            client.delete_snapshot("disk", "monday")
    client.detach("disk")
    with pytest.raises(BusyError, match="snapshot"):
        client.delete_volume("disk")
    # Nothing has changed by that.
    assert client.volume("disk").state == "ready"
    client.attach("disk")
    client.flatten("clone")
    with pytest.raises(InvalidError):
        client.flatten("clone")
    if volumes.kind != "rbd":
        client.delete_snapshot("disk", "monday")
    assert client.snapshots("disk") == []


def test_what_is_not_there_is_told(volumes: Volumes, client: GatewayClient) -> None:
    volumes.serve("disk")
    client.detach("disk")
    for use in (client.delete_snapshot, client.revert):
        with pytest.raises(NotFoundError):
            use("disk", "monday")
    with pytest.raises(NotFoundError):
        client.clone_snapshot("disk", "monday", "clone")
    with pytest.raises(NotFoundError):
        client.snapshots("nothing")
    assert [volume.name for volume in client.volumes()] == ["disk"]


def test_a_snapshot_outlives_a_killed_gateway(
    volumes: Volumes, client: GatewayClient, gateway: GatewayProcess
) -> None:
    socket = volumes.serve("disk").socket
    before = write(socket, 7)
    client.create_snapshot("disk", "monday")
    after = write(socket, 8)
    gateway.kill()
    gateway.start()
    with gateway.client() as again:
        assert [one.name for one in again.snapshots("disk")] == ["monday"]
        assert read(again.attachment("disk").socket) == after
        again.clone_snapshot("disk", "monday", "clone")
        volumes.also("clone")
        assert read(again.attach("clone").socket) == before


def test_a_volume_without_snapshots_says_so(client: GatewayClient, gateway: GatewayProcess) -> None:
    gateway.make_pool("memory")
    client.create_volume("plain", pool="pool", size=MIB)
    with pytest.raises(UnsupportedError, match="store or rbd pool"):
        client.create_snapshot("plain", "monday")


def test_a_group_has_a_snapshot_at_one_point(stored: Volumes, client: GatewayClient) -> None:
    before = {name: write(stored.serve(name).socket, seed) for name, seed in (("a", 1), ("b", 2))}
    client.create_snapshot("a", "monday", also=["b"])
    for name in before:
        write(client.attachment(name).socket, 3)
        client.clone_snapshot(name, "monday", f"{name}-then")
        stored.also(f"{name}-then")
        assert read(client.attach(f"{name}-then").socket) == before[name]


def test_a_volume_in_use_is_cloned_as_it_is(stored: Volumes, client: GatewayClient) -> None:
    socket = stored.serve("disk").socket
    before = write(socket, 7)
    client.clone_volume("disk", "copy")
    stored.also("copy")
    after = write(socket, 8)
    copy = client.attach("copy").socket
    assert read(copy) == before != after
    assert verify(copy, operations=300)["passed"]
    assert read(socket) == after


def test_a_difference_is_where_something_was_written(stored: Volumes, client: GatewayClient) -> None:
    socket = stored.serve("disk").socket
    script(socket, [{"op": "write", "offset": 0, "len": MIB, "fill": {"seed": 1}}])
    client.create_snapshot("disk", "monday")
    script(socket, [{"op": "write", "offset": 4 * MIB, "len": 4096, "fill": {"seed": 2}}])
    client.create_snapshot("disk", "tuesday")
    assert covers(client.diff("disk", until="monday").ranges, 0, MIB)
    changed = client.diff("disk", since="monday", until="tuesday")
    assert covers(changed.ranges, 4 * MIB, 4096)
    assert changed.changed < MIB
    assert client.diff("disk", since="tuesday").ranges == []


def covers(ranges: list[tuple[int, int]], offset: int, length: int) -> bool:
    return any(at <= offset and offset + length <= at + size for at, size in ranges)
