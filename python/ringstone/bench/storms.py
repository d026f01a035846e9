"""Neighbours that do their worst: frontends that keep the control thread, not a reactor, busy with another volume.

    with MemoryTables(socket) as storm:
        ...  # measure what the neighbours of that volume notice
    storm.count

Each runs on a thread of this process until the `with` block is left; what is measured belongs into another process. The
messages are those of the vhost-user specification, written by hand, as no library sends what these send.
"""

import contextlib
import os
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

_GET_FEATURES = 1
_SET_FEATURES = 2
_SET_OWNER = 3
_SET_MEM_TABLE = 5
_SET_VRING_NUM = 8
_SET_VRING_ADDR = 9
_SET_VRING_BASE = 10
_SET_VRING_KICK = 12
_SET_VRING_CALL = 13
_GET_PROTOCOL_FEATURES = 15
_SET_PROTOCOL_FEATURES = 16
_SET_VRING_ENABLE = 18
_ADD_MEM_REG = 37
_REM_MEM_REG = 38

_VERSION = 1
_NEED_REPLY = 1 << 3
_F_PROTOCOL_FEATURES = 1 << 30
_F_INDIRECT = 1 << 28
_F_VERSION_1 = 1 << 32
_REPLY_ACK = 1 << 3
_CONFIGURE_MEM_SLOTS = 1 << 15

_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_PAIR = struct.Struct("<II")
# Guest address, size, user address, offset into the descriptor.
_REGION = struct.Struct("<QQQQ")
_RING = struct.Struct("<IIQQQQ")

MIB = 1 << 20
_USER = 0x7000_0000_0000
_RING_ENTRIES = 128
_ANSWER_SECONDS = 60.0


class Frontend:
    """A connection on which one can say anything. ConnectionError when the backend closes it."""

    def __init__(self, path: str) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        try:
            self.stream.settimeout(_ANSWER_SECONDS)
            self.stream.connect(path)
        except BaseException:
            self.stream.close()
            raise

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0) -> None:
        message = _HEADER.pack(request, _VERSION | flags, len(payload)) + payload
        socket.send_fds(self.stream, [message], list(fds))

    def receive(self) -> bytes:
        """The payload of the next reply."""
        _, _, length = _HEADER.unpack(self._exactly(_HEADER.size))
        return self._exactly(length)

    def _exactly(self, length: int) -> bytes:
        received = b""
        while len(received) < length:
            part = self.stream.recv(length - len(received))
            if not part:
                raise ConnectionResetError("The backend closed the connection.")
            received += part
        return received

    def ask(self, request: int) -> int:
        self.send(request)
        return int(_U64.unpack(self.receive())[0])

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send, and wait until it is done; ConnectionError when the backend refuses."""
        self.send(request, payload, fds, flags=_NEED_REPLY)
        if _U64.unpack(self.receive())[0]:
            raise ConnectionAbortedError(f"The backend refused message {request}.")

    def negotiate(self, *, indirect: bool = False) -> None:
        features = _F_VERSION_1 | (_F_INDIRECT if indirect else 0)
        assert self.ask(_GET_FEATURES) & features == features
        wanted = _REPLY_ACK | _CONFIGURE_MEM_SLOTS
        assert self.ask(_GET_PROTOCOL_FEATURES) & wanted == wanted
        self.send(_SET_PROTOCOL_FEATURES, _U64.pack(wanted))
        self.do(_SET_OWNER)
        self.do(_SET_FEATURES, _U64.pack(features | _F_PROTOCOL_FEATURES))

    def set_memory(self, fd: int, size: int) -> None:
        """Guest memory of one region at address 0."""
        self.do(_SET_MEM_TABLE, _PAIR.pack(1, 0) + _REGION.pack(0, size, _USER, 0), [fd])

    def start_ring(self, fds: Sequence[int]) -> None:
        """Run vring 0, which lies at the begin of memory and stays empty. `fds`: its kick and its call."""
        kick, call = fds
        self.do(_SET_VRING_CALL, _U64.pack(0), [call])
        self.run_ring(0, _RING_ENTRIES, 0, 16 * _RING_ENTRIES, 4096, kick)

    def run_ring(
        self, index: int, entries: int, descriptors: int, available: int, used: int, kick: int
    ) -> None:
        """Run a vring whose parts lie at these guest addresses."""
        self.do(_SET_VRING_NUM, _PAIR.pack(index, entries))
        self.do(_SET_VRING_BASE, _PAIR.pack(index, 0))
        self.do(
            _SET_VRING_ADDR, _RING.pack(index, 0, *(_USER + at for at in (descriptors, used, available)), 0)
        )
        self.do(_SET_VRING_KICK, _U64.pack(index), [kick])
        self.do(_SET_VRING_ENABLE, _PAIR.pack(index, 1))

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Storm(ABC):
    """One neighbour. `count` says how often it has done what it does, also while it runs. `cores`: the CPUs of its
    thread. What ends it early, such as a backend that refuses it, is raised where the `with` block is left."""

    def __init__(self, path: str, *, cores: Sequence[int] = ()) -> None:
        self.count = 0
        self._path = path
        self._cores = cores
        self._enough = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=type(self).__name__)

    @abstractmethod
    def _blow(self) -> None:
        """Go on until `_enough` is set."""

    def _run(self) -> None:
        if self._cores:
            # Of this thread only, as it is asked for with 0.
            os.sched_setaffinity(0, self._cores)
        try:
            self._blow()
        except BaseException as failure:
            self._failure = failure

    @property
    def failed(self) -> bool:
        """It has ended early."""
        return self._failure is not None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enough.set()
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure


@contextlib.contextmanager
def _descriptors(memory_bytes: int) -> Iterator[list[int]]:
    """Sparse memory that takes no pages until somebody touches it, and two eventfds."""
    fds = [os.memfd_create("storm"), os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
    try:
        os.ftruncate(fds[0], memory_bytes)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


class MemoryTables(Storm):
    """SET_MEM_TABLE over and over, with a vring that has to rest for each. Counts tables."""

    def __init__(self, path: str, *, memory_bytes: int = 256 << 30, cores: Sequence[int] = ()) -> None:
        super().__init__(path, cores=cores)
        self._memory_bytes = memory_bytes

    def _blow(self) -> None:
        with _descriptors(self._memory_bytes) as (memory, *ring), Frontend(self._path) as frontend:
            frontend.negotiate()
            frontend.set_memory(memory, self._memory_bytes)
            frontend.start_ring(ring)
            while not self._enough.is_set():
                frontend.set_memory(memory, self._memory_bytes)
                self.count += 1


class MemorySlots(Storm):
    """ADD_MEM_REG until `slots` are taken, then REM_MEM_REG of all, with a vring that has to rest for each. Counts
    messages."""

    def __init__(self, path: str, *, slots: int = 64, cores: Sequence[int] = ()) -> None:
        super().__init__(path, cores=cores)
        self._slots = slots

    def _blow(self) -> None:
        with _descriptors((self._slots + 1) * MIB) as (memory, *ring), Frontend(self._path) as frontend:
            frontend.negotiate()
            frontend.set_memory(memory, MIB)
            frontend.start_ring(ring)
            regions = [
                _U64.pack(0) + _REGION.pack(at, MIB, _USER + at, at)
                for at in range(MIB, (self._slots + 1) * MIB, MIB)
            ]
            while not self._enough.is_set():
                for region in regions:
                    frontend.do(_ADD_MEM_REG, region, [memory])
                    self.count += 1
                for region in regions:
                    frontend.do(_REM_MEM_REG, region)
                    self.count += 1


class Connections(Storm):
    """Connects, asks something, and is gone, as fast as the backend accepts. Counts connections."""

    def _blow(self) -> None:
        while not self._enough.is_set():
            # One that comes before its predecessor was seen off waits, or is turned away.
            with contextlib.suppress(ConnectionError), Frontend(self._path) as frontend:
                frontend.ask(_GET_FEATURES)
                self.count += 1


class DeafFrontend(Storm):
    """Asks and never reads an answer, until the backend has had enough; then it comes back. Counts questions."""

    def _blow(self) -> None:
        while not self._enough.is_set():
            with contextlib.suppress(ConnectionError), Frontend(self._path) as frontend:
                # Its own questions may have to wait, and it for its end.
                frontend.stream.settimeout(0.1)
                while not self._enough.is_set():
                    with contextlib.suppress(TimeoutError):
                        frontend.send(_GET_FEATURES)
                        self.count += 1
