"""Upgrades of a gateway with images of a Ceph cluster beside local volumes: a cluster that hangs stops the upgrade, and
no guest of another drive."""

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest

from ringstone.bench.process import run_job
from ringstone.lab.ceph import CephCluster
from tests.framework.gateway import GatewayFailedError, GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.kinds import Volumes
from tests.framework.load import script, verify
from tests.framework.pattern import RunningPattern, running_pattern

HELLO, WELCOME, READY, STATE, REFUSED, IMAGES, OPENED, FREE, OWNED = 1, 2, 3, 4, 8, 9, 10, 11, 12
HEADER = struct.Struct("<4s3I")
READ = [{"op": "read", "offset": 0, "len": 4096}]
WRITE = [{"op": "write", "offset": 0, "len": 4096, "fill": {"seed": 3}}]


@pytest.fixture
def image(gateway: GatewayProcess, request: pytest.FixtureRequest) -> Iterator[str]:
    """The socket of a volume `disk` on an image, beside which is a volume `local`."""
    with Volumes(gateway, "rbd", request) as made:
        yield made.serve(queues=4).socket


@pytest.fixture
def local(gateway: GatewayProcess) -> str:
    return gateway.serve("local", queues=4).socket


@contextmanager
def hung(ceph: CephCluster) -> Iterator[None]:
    """The cluster takes requests and answers none."""
    daemons = ceph.daemons()
    try:
        for daemon in daemons:
            daemon.pause()
        yield
    finally:
        for daemon in daemons:
            daemon.resume()
        ceph.wait_healthy()


def load_of(socket: str) -> AbstractContextManager[RunningPattern]:
    """One that leaves the cluster its CPU, and waits for as long as that hangs."""
    return running_pattern(socket, queues=4, depth=4, rate=2000, stall_seconds=120)


def unnoticed(load: RunningPattern) -> None:
    report = load.report
    assert report.passed, report.findings
    assert (report.reconnects, report.missed_calls, report.errors) == (0, 0, 0)
    assert report.blocks_checked > 0


def longest_gap_s(load: RunningPattern) -> float:
    return load.report.longest_gap_ns / 1e9


class Successor:
    """The new process of a handover, as far as a test goes with it (docs/formats/handover.md)."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(90)
        self._socket.connect(str(gateway.run_dir / "handover.sock"))
        self._socket.sendall(json.dumps({"version": "9.0.0", "pid": os.getpid()}).encode() + b"\n")
        while self._socket.recv(1) != b"\n":
            pass
        self.say(HELLO, {"version": "9.0.0", "formats": [1], "images": True})
        self.hear(WELCOME)
        self.say(READY)

    def say(self, kind: int, body: Any = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self._socket.sendall(HEADER.pack(b"RSHO", kind, len(content), 0) + content)

    def hear(self, kind: int) -> Any:
        magic, told, length, _ = HEADER.unpack(self._exactly(HEADER.size))
        content = self._exactly(length)
        assert (magic, told) == (b"RSHO", kind), content
        return json.loads(content) if content else None

    def _exactly(self, length: int) -> bytes:
        content = b""
        while len(content) < length:
            more = self._socket.recv(length - len(content))
            assert more, "the gateway has hung up"
            content += more
        return content

    def close(self) -> None:
        self._socket.close()


def patient(socket: str, operations: list[dict[str, Any]]) -> Any:
    """The result of the one request, however long a cluster that hung takes to be back."""
    job = {"mode": "script", "socket": socket, "operations": operations, "timeout_seconds": 120}
    [result] = run_job("load", job)["results"]
    assert result["status"] == "ok"
    return result


def test_guests_of_both_do_not_notice(gateway: GatewayProcess, image: str, local: str) -> None:
    with load_of(image) as on_image, load_of(local) as on_local:
        for _ in range(2):
            gateway.upgrade()
    for load in (on_image, on_local):
        unnoticed(load)


def test_a_cluster_that_hangs_stops_the_upgrade_and_no_local_guest(
    gateway: GatewayProcess, ceph: CephCluster, image: str, local: str
) -> None:
    """All guests stood while the locks were let go of, one after another, for as long as the cluster took."""
    with load_of(image) as on_image, load_of(local) as on_local:
        with hung(ceph):
            begun = time.monotonic()
            with pytest.raises(GatewayFailedError, match="goes on"):
                gateway.upgrade()
            took = time.monotonic() - begun
        assert gateway.upgrade()["volumes"] == 2
    for load in (on_image, on_local):
        unnoticed(load)
    # It waited for the cluster, and the local guest did not.
    assert longest_gap_s(on_local) < took / 4


@pytest.mark.parametrize(
    "busy", [pytest.param(False, id="idle"), pytest.param(True, id="busy", marks=pytest.mark.soak)]
)
def test_a_cluster_that_hangs_in_the_middle_is_given_up(
    gateway: GatewayProcess, ceph: CephCluster, image: str, local: str, busy: bool
) -> None:
    """With requests in flight it is they that do not come back, otherwise it is the lock that is not let go of."""
    script(image, WRITE)
    content = script(image, READ)[0]["crc32"]
    with load_of(local) as on_local, ThreadPoolExecutor(1) as pool:
        successor = Successor(gateway)
        assert [volume["name"] for volume in successor.hear(IMAGES)["volumes"]] == ["disk"]
        begun = time.monotonic()
        with hung(ceph):
            writing = pool.submit(patient, image, WRITE) if busy else None
            if busy:
                time.sleep(1)
            successor.say(OPENED, {})
            told = "not done within" if busy else "letting go of images took more than"
            assert told in successor.hear(REFUSED)["reason"]
            took = time.monotonic() - begun
            # The local one was served throughout, and what is changed is changed.
            with gateway.client() as client:
                client.resize_volume("local", 128 << 20)
        successor.close()
        if writing is not None:
            writing.result()
        assert patient(image, READ)["crc32"] == content
    unnoticed(on_local)
    assert longest_gap_s(on_local) < took / 4
    assert verify(image, operations=200)["passed"]
    # And everything may be handed over.
    assert gateway.upgrade()["volumes"] == 2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_new_process_that_goes_at_any_step_leaves_the_image(
    gateway: GatewayProcess, image: str, local: str, steps: int
) -> None:
    """Before it has opened it, when its lock is free, and when all is handed over but the word to go."""
    with load_of(image) as on_image, load_of(local) as on_local:
        successor = Successor(gateway)
        successor.hear(IMAGES)
        if steps > 1:
            successor.say(OPENED, {})
            successor.hear(FREE)
        if steps > 2:
            successor.say(OWNED)
        successor.close()
        gateway.wait_for(
            "the handover to be given up",
            lambda client: any("No upgrade: " in event.message for event in client.events()),
        )
        assert gateway.upgrade()["volumes"] == 2
    for load in (on_image, on_local):
        unnoticed(load)


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Kind and bytes of each message, until the other side hangs up. None of them has descriptors."""
    while header := connection.recv(HEADER.size, socket.MSG_WAITALL):
        _, kind, length, _ = HEADER.unpack(header)
        yield kind, header + (connection.recv(length, socket.MSG_WAITALL) if length else b"")


def line(connection: socket.socket) -> bytes:
    read = b""
    while not read.endswith(b"\n"):
        read += connection.recv(1)
    return read


def test_a_new_process_that_dies_with_the_lock_is_shut_out(
    gateway: GatewayProcess, ceph: CephCluster, image: str, local: str
) -> None:
    """Its lock outlives it for half a minute, in which the old one could not go on, and gave the volume up."""
    door = gateway.run_dir / "handover.sock"
    real = door.with_name("real.sock")
    before = set(ceph.blocklist())
    with ExitStack() as stack:
        on_image, on_local = (stack.enter_context(load_of(one)) for one in (image, local))
        door.rename(real)
        between = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        between.bind(str(door))
        between.listen()
        command = [*gateway.command(), "--takeover"]
        new = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=gateway.environment())
        theirs = stack.enter_context(between.accept()[0])
        ours = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        ours.connect(str(real))
        ours.sendall(line(theirs))
        theirs.sendall(line(ours))
        # Whoever speaks next: the new one, and then they take turns.
        heard, told = frames(theirs), frames(ours)
        for answered in (HELLO, READY, OPENED, OWNED):
            kind, message = next(heard)
            assert kind == answered
            if kind == OWNED:
                break
            ours.sendall(message)
            theirs.sendall(next(told)[1])
        new.kill()
        new.wait()
        ours.close()
        real.rename(door)
        gateway.wait_for(
            "the handover to be given up",
            lambda client: any("No upgrade: " in event.message for event in client.events()),
        )
    for load in (on_image, on_local):
        unnoticed(load)
    assert len(set(ceph.blocklist()) - before) == 1
    assert verify(image, operations=200)["passed"]
