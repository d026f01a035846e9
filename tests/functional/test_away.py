"""A gateway that starts while etcd is away: it serves what its host owned, and changes nothing until etcd is back."""

import json
from collections.abc import Iterator

import pytest

from ringstone.errors import UnreachableError
from ringstone.lab.etcd import EtcdCluster
from tests.framework.etcd import etcd as etcd
from tests.framework.gateway import GatewayProcess
from tests.framework.load import script
from tests.framework.pattern import MIB

READ = [{"op": "read", "offset": 0, "len": 4096}]
WRITE = [{"op": "write", "offset": 0, "len": 4096, "fill": {"seed": 3}}]
KINDS = ("memory", "file")


@pytest.fixture
def gateway(etcd: EtcdCluster) -> Iterator[GatewayProcess]:
    """Of host `a`, with its state in etcd."""
    with GatewayProcess("--etcd", ",".join(etcd.endpoints), "--host", "a") as process:
        yield process.start()


def kill_etcd(etcd: EtcdCluster) -> None:
    for member in range(len(etcd.members)):
        etcd.kill(member)


def filled(gateway: GatewayProcess) -> dict[str, int]:
    """A volume of each kind, and the content of each."""
    found = {}
    for kind in KINDS:
        socket = gateway.serve(kind, kind=kind).socket
        script(socket, WRITE)
        found[kind] = script(socket, READ)[0]["crc32"]
    return found


def content(gateway: GatewayProcess) -> dict[str, int]:
    with gateway.client() as client:
        sockets = {one.volume: one.socket for one in client.attachments() if one.state == "listening"}
    return {volume: script(socket, READ)[0]["crc32"] for volume, socket in sockets.items()}


@pytest.mark.parametrize(
    "paused", [pytest.param(False, id="dead", marks=pytest.mark.soak), pytest.param(True, id="silent")]
)
def test_what_the_host_owned_is_served(gateway: GatewayProcess, etcd: EtcdCluster, paused: bool) -> None:
    """A start needed etcd, even for volumes on the host's own drives."""
    written = filled(gateway)
    with gateway.client() as client:
        client.resize_volume("file", 96 * MIB)
        client.create_volume("detached", pool="file", size=MIB)
    gateway.kill()
    if paused:
        for member in range(len(etcd.members)):
            etcd.pause(member)
    else:
        kill_etcd(etcd)
    for _ in range(2):
        gateway.start()
        assert content(gateway) == written
        gateway.kill()
    gateway.forget_starts()
    gateway.start()
    with gateway.client() as client:
        assert client.volume("file").size == 96 * MIB
        health = client.health()
        assert "etcd has not answered since the gateway's start" in health.reasons[0]
        for change in (
            lambda: client.create_volume("new", pool="file", size=MIB),
            lambda: client.detach("file"),
            lambda: client.resize_volume("file", 128 * MIB),
        ):
            with pytest.raises(UnreachableError, match="nothing can be changed"):
                change()
        assert content(gateway) == written
    if paused:
        for member in range(len(etcd.members)):
            etcd.resume(member)
    else:
        etcd.restart_all()
    gateway.wait_for("etcd to be back", lambda client: client.health().status == "ok")
    with gateway.client() as client:
        assert [volume.name for volume in client.volumes()] == ["detached", "file", "memory"]
        client.create_volume("new", pool="file", size=MIB)
        client.attach("new")
        client.detach("memory")
    gateway.restart()
    assert set(content(gateway)) == {"file", "new"}


def test_what_was_detached_is_not_served(gateway: GatewayProcess, etcd: EtcdCluster) -> None:
    filled(gateway)
    with gateway.client() as client:
        client.detach("memory")
    gateway.stop()
    kill_etcd(etcd)
    gateway.start()
    assert set(content(gateway)) == {"file"}


def test_what_was_lost_meanwhile_is_let_go_of(gateway: GatewayProcess, etcd: EtcdCluster) -> None:
    """The copy is put back to one in which the volume is attached, as of a gateway that died in between."""
    filled(gateway)
    remembered = gateway.state_dir / "owned.json"
    before = remembered.read_bytes()
    assert {one["volume"] for one in json.loads(before)["attachments"]} == set(KINDS)
    with gateway.client() as client:
        client.detach("memory")
    gateway.stop()
    remembered.write_bytes(before)
    kill_etcd(etcd)
    gateway.start()
    assert set(content(gateway)) == set(KINDS)
    etcd.restart_all()
    gateway.wait_for(
        "it to be let go of", lambda client: [one.volume for one in client.attachments()] == ["file"]
    )
    gateway.wait_for(
        "the event",
        lambda client: any("nobody owns it" in event.message for event in client.events(volume="memory")),
    )
    assert set(content(gateway)) == {"file"}


def test_a_host_that_never_met_etcd_says_so(etcd: EtcdCluster) -> None:
    kill_etcd(etcd)
    with GatewayProcess("--etcd", ",".join(etcd.endpoints), "--host", "a") as other:
        done = other.run_to_end()
    assert done.returncode == 7
    assert "etcd does not answer" in done.stderr


def test_a_damaged_copy_is_told(gateway: GatewayProcess, etcd: EtcdCluster) -> None:
    gateway.stop()
    (gateway.state_dir / "owned.json").write_text('{"format": "ringstone-owned"')
    done = gateway.run_to_end()
    assert done.returncode == 12
    assert "remove it" in done.stderr
    (gateway.state_dir / "owned.json").unlink()
    gateway.start()


def test_the_store_remembers_what_the_host_has(gateway: GatewayProcess) -> None:
    def remembered() -> list[tuple[str, int]]:
        kept = json.loads((gateway.state_dir / "owned.json").read_bytes())
        return [(one["volume"], one["epoch"]) for one in kept["attachments"]]

    assert remembered() == []
    gateway.serve("v")
    assert remembered() == [("v", 1)]
    with gateway.client() as client:
        client.detach("v")
        assert remembered() == []
        client.attach("v")
    assert remembered() == [("v", 2)]
