"""Hostile vhost-user frontends: each does one thing over and over on a volume's socket, on a thread of its own.

The messages are those of the vhost-user specification, made by hand: no library sends them so fast or so wrong.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from ringstone.errors import RingstoneError

SPARSE_BYTES = 256 << 30

_GET_FEATURES, _SET_OWNER, _SET_MEM_TABLE = 1, 3, 5
_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES = 15, 16
_ADD_MEM_REG, _REM_MEM_REG = 37, 38
_VERSION, _NEED_REPLY = 1, 8
_REPLY_ACK, _CONFIGURE_MEM_SLOTS = 1 << 3, 1 << 15
_HEADER = struct.Struct("<III")
_REGION = struct.Struct("<QQQQ")
_REGION_BYTES = 2 << 20
_SECONDS = 5.0
_JAM_SECONDS = 0.05
_START_SECONDS = 30.0


class Frontend:
    """A connection that has negotiated what a storm needs."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(_SECONDS)
            self.socket.connect(str(path))
            self._tell(_SET_OWNER)
            self._tell(_GET_FEATURES)
            self._receive()
            wanted = struct.pack("<Q", _REPLY_ACK | _CONFIGURE_MEM_SLOTS)
            self._tell(_GET_PROTOCOL_FEATURES)
            self._receive()
            self._tell(_SET_PROTOCOL_FEATURES, wanted)
        except BaseException:
            self.socket.close()
            raise

    def _tell(self, request: int, payload: bytes = b"") -> None:
        self.socket.sendall(_HEADER.pack(request, _VERSION, len(payload)) + payload)

    def _receive(self) -> bytes:
        header = self._exactly(_HEADER.size)
        return self._exactly(_HEADER.unpack(header)[2])

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise ConnectionResetError("the backend closed the connection")
            data += piece
        return data

    def ask(self, request: int, payload: bytes, fd: int | None = None) -> None:
        """Returns when the backend has done it, well or not."""
        message = _HEADER.pack(request, _VERSION | _NEED_REPLY, len(payload)) + payload
        socket.send_fds(self.socket, [message], [] if fd is None else [fd])
        self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()


class Storm(ABC):
    """Rages while it is entered. `count`: how often it has done its thing. Enters when it has done it once."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._calm = threading.Event()
        self._thread = threading.Thread(name="storm", target=self._run, daemon=True)

    @abstractmethod
    def rage(self) -> None:
        """Until the connection breaks or `over`."""

    @property
    def over(self) -> bool:
        return self._calm.is_set()

    def _run(self) -> None:
        while not self.over:
            # A backend that throws a hostile frontend out is right; it comes back.
            with contextlib.suppress(OSError):
                self.rage()

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self.count:
            if time.monotonic() > deadline:
                self._end()
                raise RingstoneError(f"A storm on {self._path} could not begin. See the gateway's log.")
            time.sleep(0.001)
        return self

    def _end(self) -> None:
        self._calm.set()
        self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


class MemoryTableStorm(Storm):
    """SET_MEM_TABLE of one sparse memory of 256 GiB, again and again."""

    def rage(self) -> None:
        fd = _sparse(SPARSE_BYTES)
        try:
            table = struct.pack("<II", 1, 0) + _REGION.pack(0, SPARSE_BYTES, 0x7000_0000_0000, 0)
            with Frontend(self._path) as frontend:
                while not self.over:
                    frontend.ask(_SET_MEM_TABLE, table, fd)
                    self.count += 1
        finally:
            os.close(fd)


class MemoryRegionStorm(Storm):
    """ADD_MEM_REG and REM_MEM_REG of the same region in turn."""

    def rage(self) -> None:
        fd = _sparse(_REGION_BYTES)
        try:
            region = struct.pack("<Q", 0) + _REGION.pack(0, _REGION_BYTES, 0x7000_0000_0000, 0)
            with Frontend(self._path) as frontend:
                while not self.over:
                    frontend.ask(_ADD_MEM_REG, region, fd)
                    frontend.ask(_REM_MEM_REG, region)
                    self.count += 1
        finally:
            os.close(fd)


class ConnectStorm(Storm):
    """Connects, negotiates and leaves."""

    def rage(self) -> None:
        while not self.over:
            with Frontend(self._path):
                self.count += 1


class DeafStorm(Storm):
    """Asks without ever reading an answer, until the socket is full or the backend has enough of it."""

    def rage(self) -> None:
        question = _HEADER.pack(_GET_FEATURES, _VERSION, 0) * 64
        while not self.over:
            with Frontend(self._path) as frontend:
                frontend.socket.settimeout(_JAM_SECONDS)
                with contextlib.suppress(OSError):
                    while not self.over:
                        frontend.socket.sendall(question)
                self.count += 1


def _sparse(size: int) -> int:
    fd = os.memfd_create("ringstone-storm", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
