"""An engine that serves nobody: it keeps what it was told, checks it as the real one does, and fails on
command.

For tests of the gateway's logic. What needs a disk to be served is tested against the real engine.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ringstone.errors import BusyError, ExistsError, NotFoundError, RingstoneError
from ringstone.gateway.engine import EngineAttachment, EngineQueue, EngineVolume
from ringstone.gateway.rights import OUR_OWN, SocketIds
from ringstone.state.records import JsonValue


@dataclass
class FakeEngine:
    """Implements ringstone.gateway.engine.EnginePort. `failures`: raised once by the method of that name."""

    failures: dict[str, RingstoneError] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    backends: dict[str, dict[str, JsonValue]] = field(default_factory=dict)
    rights: dict[str, SocketIds] = field(default_factory=dict)
    serials: dict[str, str] = field(default_factory=dict)
    cores: list[int] = field(default_factory=lambda: [1])
    before: Callable[[str], None] = lambda call: None
    keys: dict[str, bytes | None] = field(default_factory=dict)
    _volumes: dict[str, EngineVolume] = field(default_factory=dict)
    _attachments: dict[str, EngineAttachment] = field(default_factory=dict)

    def _enter(self, method: str, name: str) -> None:
        self.calls.append(f"{method} {name}")
        self.before(f"{method} {name}")
        failure = self.failures.pop(method, None)
        if failure is not None:
            raise failure

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
        self._enter("open_volume", name)
        if name in self._volumes:
            raise ExistsError(f"The engine has volume {name!r} open.")
        self.backends[name] = backend
        self.serials[name] = serial
        self.keys[name] = key
        kind = str(backend["type"])
        self._volumes[name] = EngineVolume(name, size, block_size, read_only, kind, "fake", True, False)

    def close_volume(self, name: str) -> None:
        self._enter("close_volume", name)
        if name in self._attachments:
            raise BusyError(f"Volume {name!r} is attached.")
        if self._volumes.pop(name, None) is None:
            raise NotFoundError(f"The engine has no volume {name!r}.")

    def own_volume(self, name: str, backend: dict[str, JsonValue]) -> None:
        self._enter("own_volume", name)
        self.backends[name] = backend

    def release_volume(self, name: str) -> None:
        self._enter("release_volume", name)

    def fence_volume(self, name: str) -> None:
        self._enter("fence_volume", name)
        self._volumes[name] = replace(self._volumes[name], fenced=True)

    def resize_volume(self, name: str, size: int) -> None:
        self._enter("resize_volume", name)
        self._volumes[name] = replace(self._volumes[name], size=size)

    def volumes(self) -> list[EngineVolume]:
        return list(self._volumes.values())

    def attach(self, name: str, socket_path: str, *, queues: int, rights: SocketIds = OUR_OWN) -> None:
        self._enter("attach", name)
        self.rights[name] = rights
        if name in self._attachments:
            raise ExistsError(f"Volume {name!r} is attached.")
        self._volumes[name] = replace(self._volumes[name], attached=True)
        stopped = tuple(EngineQueue(index, 0, None, False) for index in range(queues))
        self._attachments[name] = EngineAttachment(name, socket_path, "listening", 0, 0, 0, 0, None, stopped)

    def detach(self, name: str, *, force: bool) -> None:
        self._enter("detach", name)
        if self._attachments[name].peer_pid is not None and not force:
            raise BusyError(f"A frontend uses volume {name!r}.")
        del self._attachments[name]
        self._volumes[name] = replace(self._volumes[name], attached=False)

    def move_queue(self, name: str, queue: int, core: int) -> None:
        self._enter("move_queue", f"{name} {queue} {core}")
        if core not in self.cores:
            raise NotFoundError(f"There is no reactor on CPU {core}.")

    def reactors(self) -> dict[int, int]:
        return dict(enumerate(self.cores))

    def add_reactor(self, core: int) -> None:
        self._enter("add_reactor", str(core))
        if core in self.cores:
            raise ExistsError(f"There is a reactor on CPU {core}.")
        self.cores.append(core)

    def remove_reactor(self, core: int) -> None:
        self._enter("remove_reactor", str(core))
        if self.cores == [core]:
            raise BusyError(f"The reactor on CPU {core} is the only one.")
        self.cores.remove(core)

    def share(self, name: str, shared: bool) -> None:
        self._enter("share", name)
        if not shared and self._attachments[name].frontends > 1:
            raise BusyError(f"Two frontends are connected to volume {name!r}; stop one of them first.")
        self._attachments[name] = replace(self._attachments[name], shared=shared)

    def attachments(self) -> list[EngineAttachment]:
        return list(self._attachments.values())

    def connect(self, name: str, *, peer_pid: int) -> None:
        """As if a frontend had connected and its first queue ran."""
        queues = self._attachments[name].queues
        self._attachments[name] = replace(
            self._attachments[name],
            state="running",
            peer_pid=peer_pid,
            frontends=self._attachments[name].frontends + 1,
            memory_bytes=1 << 30,
            memory_regions=1,
            queues=(EngineQueue(0, 256, 0, True), *queues[1:]),
        )
