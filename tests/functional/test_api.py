"""The control API of a real gateway, through its client and as raw HTTP."""

import socket
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from ringstone.client import GatewayClient
from ringstone.errors import BusyError, ExistsError, InvalidError, NoSpaceError, NotFoundError
from ringstone.models import Faults, PoolCreate
from tests.framework.gateway import GatewayProcess

MIB = 1 << 20


def test_only_the_owner_may_connect(gateway: GatewayProcess) -> None:
    assert stat.S_IMODE(gateway.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(gateway.state_dir.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["memory", "file", "null"])
def test_each_kind_of_pool_serves_a_volume(gateway: GatewayProcess, kind: str) -> None:
    attachment = gateway.serve("v", kind=kind, size=8 * MIB, queues=2)
    assert (attachment.state, attachment.queues, len(attachment.queue_states)) == ("listening", 2, 2)
    with gateway.client() as client:
        volume = client.volume("v")
        assert volume.detail
        assert volume.attachment == attachment
        assert volume.allocated is not None
        # The memory is taken when the volume is made, a file grows as it is written: one block may be
        # metadata.
        assert volume.allocated >= 8 * MIB if kind == "memory" else volume.allocated <= 4096
        # Someone listens there.
        with socket.socket(socket.AF_UNIX) as frontend:
            frontend.connect(attachment.socket)
        stats = client.stats(volume="v")
        assert [(queue.volume, queue.index) for queue in stats.queues] == [("v", 0), ("v", 1)]
        client.detach("v", force=True)
        assert client.stats(volume="v").queues == ()
        client.delete_volume("v")


def test_a_client_gets_the_gateways_errors(gateway: GatewayProcess) -> None:
    gateway.serve("v")
    with gateway.client() as client:
        with pytest.raises(ExistsError):
            client.create_volume("v", pool="memory", size=MIB)
        with pytest.raises(NotFoundError):
            client.volume("w")
        with pytest.raises(InvalidError):
            client.create_volume("w", pool="memory", size=1000)
        with pytest.raises(NoSpaceError):
            client.create_volume("w", pool="memory", size=1 << 60)
        with pytest.raises(BusyError):
            client.delete_volume("v")
        for strange in ("..", ".", "a/b", "%2e", "a?b#c", "ü"):
            with pytest.raises(NotFoundError):
                client.volume(strange)
        assert [volume.name for volume in client.volumes()] == ["v"]


def test_a_volume_in_use_is_detached_only_by_force(gateway: GatewayProcess) -> None:
    attachment = gateway.serve("v")
    with gateway.client() as client, socket.socket(socket.AF_UNIX) as frontend:
        frontend.connect(attachment.socket)
        # Accepted once the session has answered: VHOST_USER_GET_FEATURES is request 1, version 1, no payload.
        frontend.sendall(b"\x01\0\0\0\x01\0\0\0\0\0\0\0")
        assert frontend.recv(20, socket.MSG_WAITALL)[:4] == b"\x01\0\0\0"
        assert client.attachment("v").state == "connected"
        with pytest.raises(BusyError):
            client.detach("v")
        assert client.attachment("v").state == "connected"
        client.detach("v", force=True)
        assert frontend.recv(1) == b""
        with pytest.raises(NotFoundError):
            client.attachment("v")


def test_what_the_engine_reports_reaches_the_events_and_the_log(gateway: GatewayProcess) -> None:
    """A frontend that sends nonsense costs it its session; the volume goes on and the log says why."""
    attachment = gateway.serve("v")
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(attachment.socket)
        hostile.sendall(b"\xff" * 64)

    def told(client: GatewayClient) -> bool:
        return any(event.level == "error" for event in client.events(volume="v"))

    gateway.wait_for("the engine's report", told)
    gateway.wait_for("the next frontend's turn", lambda client: client.attachment("v").state == "listening")
    assert "ERROR   ringstone.gateway: volume v: " in gateway.log()


def test_a_socket_in_use_is_not_taken_over(gateway: GatewayProcess) -> None:
    path = gateway.run_dir / "vhost/busy.sock"
    gateway.serve("v")
    with gateway.client() as client, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client.create_volume("w", pool="memory", size=MIB)
        with pytest.raises(ExistsError):
            client.attach("w", socket=str(path))
        assert [one.volume for one in client.attachments()] == ["v"]
        listener.close()
        # Nobody listens any more: the stale socket is replaced.
        assert client.attach("w", socket=str(path)).socket == str(path)


def test_many_clients_at_once_make_one_volume_each_name(gateway: GatewayProcess) -> None:
    gateway.make_pool("null")

    def create(number: int) -> str:
        with GatewayClient(gateway.socket) as client:
            try:
                client.create_volume(f"v{number % 4}", pool="pool", size=MIB)
                client.attach(f"v{number % 4}")
                return "made"
            except ExistsError:
                return "taken"

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(create, range(16)))
    assert outcomes.count("made") == 4
    with gateway.client() as client:
        assert [one.volume for one in client.attachments()] == ["v0", "v1", "v2", "v3"]


def test_faulty_pools_are_for_tests_only(gateway: GatewayProcess) -> None:
    with gateway.client() as client, pytest.raises(InvalidError, match="use memory, file, store, rbd, null"):
        client.create_pool(PoolCreate(name="f", type="faulty"))
    with GatewayProcess(test_pools=True) as testing:
        testing.start()
        with testing.client() as client:
            path = str(testing.memory / "faulty")
            client.create_pool(
                PoolCreate(name="f", type="faulty", path=path, faults=Faults(delay_us=10, seed=1))
            )
            client.create_volume("v", pool="f", size=MIB)
            assert client.attach("v").state == "listening"


@pytest.mark.parametrize(
    "content",
    [
        b"GET /v1/volumes HTTP/9.9\r\n\r\n",
        b"\0" * 4096,
        b"POST /v1/volumes HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
    ],
    ids=["version", "zeroes", "cut short"],
)
def test_a_broken_http_client_disturbs_nobody(gateway: GatewayProcess, content: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as broken, gateway.client() as client:
        broken.connect(str(gateway.socket))
        broken.sendall(content)
        broken.shutdown(socket.SHUT_WR)
        while broken.recv(4096):
            pass
        assert client.volumes() == []
