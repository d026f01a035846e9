"""etcd clusters in memory for tests, and a proxy that makes a member's network bad."""

import contextlib
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ringstone.lab.etcd import EtcdCluster
from ringstone.state.etcd import EtcdStore
from ringstone.state.settings import EtcdSettings


@pytest.fixture(scope="session")
def lone_etcd() -> Iterator[EtcdCluster]:
    """One member, for whatever needs etcd but no failures of it. Tests have prefixes of their own."""
    directory = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
    cluster = EtcdCluster(directory)
    try:
        cluster.start(1)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory)


@pytest.fixture
def etcd() -> Iterator[EtcdCluster]:
    """Three members, for whoever harms them."""
    directory = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
    cluster = EtcdCluster(directory)
    try:
        cluster.start(3)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory)


def settings_of(cluster: EtcdCluster, prefix: str | None = None, attempt_s: float = 1.0) -> EtcdSettings:
    """Of a store whose prefix nobody else has, unless it is given."""
    return EtcdSettings(cluster.endpoints, prefix=prefix or f"/{uuid.uuid4()}/", attempt_s=attempt_s)


def store_of(cluster: EtcdCluster, prefix: str | None = None) -> EtcdStore:
    return EtcdStore(settings_of(cluster, prefix))


class Proxy:
    """A TCP proxy before one member. `delay_s`: each piece of an answer comes that much later. With `lose_answers()`
    requests reach the member and their answers are dropped with the connection; with `hold_requests()` a request is
    kept here, its sender's connection is closed, and `let_go()` delivers it after all."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        assert parts.hostname is not None
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self._lose = 0
        self._hold = 0
        self._match = b""
        self._instead = b""
        self._lock = threading.Lock()
        self._held: list[bytes] = []
        self.harmed = threading.Event()
        self._stop = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def lose_answers(self, count: int, match: bytes = b"/kv/txn", instead: bytes = b"") -> None:
        """Of the next `count` requests that have `match`; the client gets the answer `instead`, if there is one."""
        with self._lock:
            self._lose, self._match, self._instead = count, match, instead
            self.harmed.clear()

    def hold_requests(self, count: int, match: bytes = b"/kv/txn") -> None:
        with self._lock:
            self._hold, self._match = count, match
            self.harmed.clear()

    def let_go(self) -> list[bytes]:
        """Deliver what is held, now; returns the answers."""
        answers = []
        for request in self._held:
            with socket.create_connection(self._target) as connection:
                connection.sendall(request)
                answers.append(_whole_message(connection))
        self._held.clear()
        return answers

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._stop.is_set():
                    client.close()
                    return
                self._sockets.append(client)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        """Request by request, as HTTP/1.1 has them; a watch, whose answer has no end, is not for this."""
        try:
            with client, socket.create_connection(self._target) as server:
                with self._lock:
                    self._sockets.append(server)
                while request := _whole_message(client):
                    harm = self._harm(request)
                    if harm == "hold":
                        self._held.append(request)
                        self.harmed.set()
                        return
                    server.sendall(request)
                    answer = _whole_message(server)
                    if harm == "lose":
                        self.harmed.set()
                        client.sendall(self._instead)
                        return
                    if self._stop.wait(self.delay_s):
                        return
                    client.sendall(answer)
        except OSError:
            pass

    def _harm(self, request: bytes) -> str | None:
        with self._lock:
            if self._match not in request.split(b"\r\n", 1)[0]:
                return None
            if self._hold:
                self._hold -= 1
                return "hold"
            if self._lose:
                self._lose -= 1
                return "lose"
        return None

    def close(self) -> None:
        with self._lock:
            self._stop.set()
            # Closing alone does not wake the thread that accepts.
            self._listener.shutdown(socket.SHUT_RDWR)
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


def _whole_message(connection: socket.socket) -> bytes:
    """One HTTP message with a Content-Length; nothing when the other side has ended."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [
        line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    ]
    wanted = int(lengths[0]) if lengths else 0
    while len(body) < wanted:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
        body += piece
    return data
