"""Volumes on a real Ceph cluster: what Ceph's own tools see of them, and what a person hears who makes a mistake."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringstone.client import GatewayClient
from ringstone.errors import (
    BusyError,
    DeniedError,
    ExistsError,
    NoDeviceError,
    RingstoneError,
    UnsupportedError,
)
from ringstone.lab.ceph import CephCluster
from ringstone.models import PoolCreate, RbdOptions
from tests.framework.gateway import GatewayProcess
from tests.framework.load import script, verify
from tests.framework.rbd import make_rbd_pool

MIB = 1 << 20
WRITE = {"op": "write", "offset": 8 * 4096, "len": 64 * 1024, "fill": {"seed": 7}}
READ = {"op": "read", "offset": 8 * 4096, "len": 64 * 1024}


@pytest.fixture
def client(gateway: GatewayProcess, ceph: CephCluster) -> Iterator[GatewayClient]:
    """Of a gateway with an rbd pool `ceph`, whose volumes are gone afterwards."""
    make_rbd_pool(gateway, ceph)
    with gateway.client() as client:
        yield client
        for volume in client.volumes(pool="ceph"):
            if volume.attachment is not None:
                client.detach(volume.name, force=True)
        clones = [volume.name for volume in client.volumes(pool="ceph")]
        # A clone goes before its parent.
        for name in reversed(clones):
            for snapshot in client.snapshots(name):
                client.delete_snapshot(name, snapshot.name)
            client.delete_volume(name)


def test_images_are_ceph_s_own(client: GatewayClient, ceph: CephCluster) -> None:
    client.create_volume("disk", pool="ceph", size=64 * MIB)
    socket = client.attach("disk").socket
    written = script(socket, [WRITE, READ])[-1]["crc32"]
    assert "disk" in ceph.rbd("ls", "rbd").split()
    client.resize_volume("disk", 96 * MIB)
    assert '"size":100663296' in ceph.rbd("info", "rbd/disk", "--format", "json").replace(" ", "")
    client.detach("disk")
    # Read by nothing of ours.
    target = Path(ceph.conf_path).parent / "exported"
    ceph.rbd("export", "rbd/disk", str(target))
    content = target.read_bytes()
    target.unlink()
    assert zlib.crc32(content[8 * 4096 : 8 * 4096 + 64 * 1024]) == written


def test_a_killed_gateway_gets_its_volumes_back(
    client: GatewayClient, gateway: GatewayProcess, ceph: CephCluster
) -> None:
    client.create_volume("disk", pool="ceph", size=64 * MIB)
    written = script(client.attach("disk").socket, [WRITE, READ])[-1]["crc32"]
    for _ in range(2):
        before = set(ceph.blocklist())
        gateway.kill()
        gateway.start()
        # The dead process is shut out, so that nothing of it can land any more.
        assert set(ceph.blocklist()) > before
        socket = client.attachment("disk").socket
        assert script(socket, [READ])[-1]["crc32"] == written


def test_an_upgrade_hands_the_lock_over(client: GatewayClient, gateway: GatewayProcess) -> None:
    client.create_volume("disk", pool="ceph", size=64 * MIB)
    socket = client.attach("disk").socket
    written = script(socket, [WRITE, READ])[-1]["crc32"]
    gateway.upgrade()
    assert script(socket, [READ])[-1]["crc32"] == written
    assert verify(socket, operations=200)["passed"]


def test_an_image_of_somebody_else_is_left_alone(client: GatewayClient, ceph: CephCluster) -> None:
    ceph.rbd("create", "-s", "64M", "rbd/theirs")
    with pytest.raises(ExistsError, match="rbd rm"):
        client.create_volume("theirs", pool="ceph", size=64 * MIB)
    ceph.rbd("rm", "rbd/theirs")


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"conf": "/nowhere/ceph.conf"}, NoDeviceError, "ceph.conf"),
        ({"ceph_pool": "nowhere"}, NoDeviceError, "ceph osd pool"),
        ({"keyring": "/nowhere/keyring"}, NoDeviceError, "keyring"),
        ({"user": "client.nobody"}, RingstoneError, "key"),
    ],
)
def test_a_pool_that_cannot_be_reached_is_not_made(
    gateway: GatewayProcess,
    ceph: CephCluster,
    options: dict[str, str],
    error: type[RingstoneError],
    remedy: str,
) -> None:
    with gateway.client() as client:
        where = {"conf": str(ceph.conf_path), "user": "client.ringstone", "ceph_pool": "rbd"} | options
        with pytest.raises(error, match=remedy):
            client.create_pool(PoolCreate(name="bad", type="rbd", rbd=RbdOptions.model_validate(where)))
        assert client.pools() == []


def test_a_wrong_key_is_refused(gateway: GatewayProcess, ceph: CephCluster, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_text("[client.ringstone]\n\tkey = AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==\n")
    where = RbdOptions(
        conf=str(ceph.conf_path), user="client.ringstone", ceph_pool="rbd", keyring=str(keyring)
    )
    with gateway.client() as client, pytest.raises(DeniedError, match="ceph auth get"):
        client.create_pool(PoolCreate(name="bad", type="rbd", rbd=where))


def test_an_image_that_another_client_uses_is_not_taken(client: GatewayClient, ceph: CephCluster) -> None:
    client.create_volume("disk", pool="ceph", size=64 * MIB)
    ceph.rbd("lock", "add", "rbd/disk", "theirs")
    with pytest.raises(BusyError, match="locked by another client"):
        client.attach("disk")
    assert client.volume("disk").attachment is None
    locker = json.loads(ceph.rbd("lock", "ls", "rbd/disk", "--format", "json"))[0]["locker"]
    ceph.rbd("lock", "rm", "rbd/disk", "theirs", locker)
    client.attach("disk")


def test_an_image_without_the_exclusive_lock_is_not_attached(
    client: GatewayClient, ceph: CephCluster
) -> None:
    client.create_volume("disk", pool="ceph", size=64 * MIB)
    # Without fast-diff goes object-map too.
    for feature in ("fast-diff", "exclusive-lock"):
        ceph.rbd("feature", "disable", "rbd/disk", feature)
    with pytest.raises(UnsupportedError, match="rbd feature enable"):
        client.attach("disk")
