"""The only door to the Rust engine: its calls with Python's types and the project's errors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from ringstone import _engine
from ringstone.errors import error_of_code
from ringstone.gateway.events import Event
from ringstone.gateway.rights import OUR_OWN, SocketIds
from ringstone.state.records import JsonValue


@dataclass(frozen=True, slots=True)
class EngineQueue:
    """`entries` is 0 until the frontend sets the ring up; `reactor` indexes the engine's cores, None while
    stopped."""

    index: int
    entries: int
    reactor: int | None
    running: bool


@dataclass(frozen=True, slots=True)
class EngineAttachment:
    """`state`: listening, connected, running or needs_reset. Memory sizes are bytes. `shared`: a second frontend
    may connect, for a live migration; `frontends` are connected now."""

    volume: str
    socket: str
    state: str
    features: int
    protocol_features: int
    memory_bytes: int
    memory_regions: int
    peer_pid: int | None
    queues: tuple[EngineQueue, ...]
    packed: bool = False
    shared: bool = False
    frontends: int = 0


@dataclass(frozen=True, slots=True)
class EngineVolume:
    """A volume the engine has open. `detail` says how, for people ("io_uring, O_DIRECT")."""

    name: str
    size: int
    block_size: int
    read_only: bool
    backend: str
    detail: str
    discard: bool
    attached: bool
    fenced: bool = False
    client: str | None = None


class EnginePort(Protocol):
    """What the service needs of an engine. Calls block; errors are ringstone.errors."""

    def open_volume(
        self,
        name: str,
        backend: dict[str, JsonValue],
        *,
        size: int,
        block_size: int,
        read_only: bool,
        serial: str,
        key: bytes | None = None,
    ) -> None: ...
    def close_volume(self, name: str) -> None: ...
    def resize_volume(self, name: str, size: int) -> None: ...
    def own_volume(self, name: str, backend: dict[str, JsonValue]) -> None: ...
    def release_volume(self, name: str) -> None: ...
    def fence_volume(self, name: str) -> None: ...
    def volumes(self) -> list[EngineVolume]: ...
    def attach(self, name: str, socket_path: str, *, queues: int, rights: SocketIds = OUR_OWN) -> None: ...
    def detach(self, name: str, *, force: bool) -> None: ...
    def move_queue(self, name: str, queue: int, core: int) -> None: ...
    def reactors(self) -> dict[int, int]: ...
    def add_reactor(self, core: int) -> None: ...
    def remove_reactor(self, core: int) -> None: ...
    def share(self, name: str, shared: bool) -> None: ...
    def attachments(self) -> list[EngineAttachment]: ...


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _engine.EngineError as error:
        raise error_of_code(error.code, str(error)) from error


@dataclass(frozen=True, slots=True)
class TakenOver:
    """`version` is the release of the process before; `descriptors` of the control side are the caller's to
    close."""

    version: str
    volumes: int
    stall_ns: int
    descriptors: dict[str, int]


@dataclass(frozen=True, slots=True)
class HandedOver:
    """`version` is the release that goes on; `drain_ns` is the part of the stall until all in flight was
    done."""

    version: str
    volumes: int
    stall_ns: int
    drain_ns: int


class Engine:
    """Implements EnginePort over ringstone._engine.Engine. `stats_path`: docs/formats/stats-page.md."""

    def __init__(self, cores: Sequence[int], *, idle_us: int, stats_path: Path, balance: bool = True) -> None:
        with _translated():
            self._engine = _engine.Engine(cores, idle_us=idle_us, stats_path=str(stats_path), balance=balance)

    @classmethod
    def take_over(
        cls,
        socket: int,
        cores: Sequence[int],
        *,
        idle_us: int,
        stats_path: Path,
        balance: bool,
        version: str,
    ) -> tuple[Self, TakenOver]:
        """An engine that goes on with what the one at the other end of `socket` serves."""
        self = cls.__new__(cls)
        with _translated():
            self._engine, taken = _engine.Engine.take_over(
                socket, cores, idle_us=idle_us, stats_path=str(stats_path), balance=balance, version=version
            )
        return self, TakenOver(taken["version"], taken["volumes"], taken["stall_ns"], taken["extras"])

    def hand_over(self, socket: int, *, version: str, extras: Mapping[str, int]) -> HandedOver:
        """Blocks until the engine at the other end of `socket` serves; then abandon() this one. GoneError when
        that one was lost after the word to go; after any other error everything goes on here."""
        with _translated():
            return HandedOver(**self._engine.hand_over(socket, version=version, extras=extras))

    def abandon(self) -> None:
        """End without touching sockets and frontends, which another process has."""
        self._engine.abandon()

    def move_queue(self, name: str, queue: int, core: int) -> None:
        with _translated():
            self._engine.move_queue(name, queue, core)

    def reactors(self) -> dict[int, int]:
        """Core by index of the reactors that take queues."""
        with _translated():
            return dict(self._engine.reactors())

    def add_reactor(self, core: int) -> None:
        with _translated():
            self._engine.add_reactor(core)

    def remove_reactor(self, core: int) -> None:
        with _translated():
            self._engine.remove_reactor(core)

    def open_volume(
        self,
        name: str,
        backend: dict[str, JsonValue],
        *,
        size: int,
        block_size: int,
        read_only: bool,
        serial: str,
        key: bytes | None = None,
    ) -> None:
        with _translated():
            self._engine.open_volume(
                name,
                json.dumps(backend),
                size=size,
                block_size=block_size,
                read_only=read_only,
                serial=serial,
                key=key,
            )

    def close_volume(self, name: str) -> None:
        with _translated():
            self._engine.close_volume(name)

    def own_volume(self, name: str, backend: dict[str, JsonValue]) -> None:
        """Of an incoming one: from here on its queues run."""
        with _translated():
            self._engine.own_volume(name, json.dumps(backend))

    def release_volume(self, name: str) -> None:
        """Let another host own it; it is incoming then. BusyError while its queues run."""
        with _translated():
            self._engine.release_volume(name)

    def fence_volume(self, name: str) -> None:
        """Stop its I/O at once and for good, as another host owns it."""
        with _translated():
            self._engine.fence_volume(name)

    def resize_volume(self, name: str, size: int) -> None:
        with _translated():
            self._engine.resize_volume(name, size)

    def volumes(self) -> list[EngineVolume]:
        with _translated():
            return [EngineVolume(**info) for info in self._engine.volumes()]

    def attach(self, name: str, socket_path: str, *, queues: int, rights: SocketIds = OUR_OWN) -> None:
        with _translated():
            self._engine.attach(
                name, socket_path, queues=queues, owner=rights.owner, group=rights.group, mode=rights.mode
            )

    def detach(self, name: str, *, force: bool) -> None:
        with _translated():
            self._engine.detach(name, force=force)

    def share(self, name: str, shared: bool) -> None:
        with _translated():
            self._engine.share(name, shared)

    def attachments(self) -> list[EngineAttachment]:
        with _translated():
            infos = self._engine.attachments()
        return [
            EngineAttachment(
                volume=info["volume"],
                socket=info["socket"],
                state=info["state"],
                features=info["features"],
                protocol_features=info["protocol_features"],
                memory_bytes=info["memory_bytes"],
                memory_regions=info["memory_regions"],
                peer_pid=info["peer_pid"],
                queues=tuple(
                    EngineQueue(queue["index"], queue["size"], queue["reactor"], queue["running"])
                    for queue in info["queues"]
                ),
                packed=info["packed"],
                shared=info["shared"],
                frontends=info["frontends"],
            )
            for info in infos
        ]

    def watchdog(self, socket: str, interval_ms: int) -> None:
        """Tell the service manager at `socket` every `interval_ms` that the reactors turn, until stop()."""
        with _translated():
            self._engine.watchdog(socket, interval_ms)

    def event_fd(self) -> int:
        """Readable while drain_events() has something."""
        return self._engine.event_fd()

    def drain_events(self) -> list[Event]:
        """Does not block."""
        return [Event(**event) for event in self._engine.drain_events()]

    def stop(self) -> None:
        """Detach everything, drain and join the reactors. Idempotent."""
        self._engine.stop()


def engine_version() -> str:
    return _engine.__version__
