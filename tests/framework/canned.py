"""A server on a Unix socket that says the same to everybody."""

import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self


def answer(status: int, content: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class Canned:
    """`reply` goes to each connection behind its request, once `held`, if there is one, is set; those of `first` go
    before it, one each. `asked` are the requests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reply = answer(200, b"[]")
        self.first: list[bytes] = []
        self.held: threading.Event | None = None
        self.asked: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(_request(connection))
                if self.held is not None:
                    self.held.wait()
                try:
                    connection.sendall(self.first.pop(0) if self.first else self.reply)
                except BrokenPipeError:
                    # Whoever asked has given up.
                    continue


def _request(connection: socket.socket) -> bytes:
    """All of it, with its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(4096)
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    missing = (int(lengths[0].partition(b":")[2]) if lengths else 0) - len(body)
    while missing > 0:
        more = connection.recv(missing)
        received, missing = received + more, missing - len(more)
    return received
