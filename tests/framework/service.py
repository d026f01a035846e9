"""A machine whose gateway has a real store and real pools, and an engine that serves nobody."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringstone.gateway.events import EventLog
from ringstone.gateway.service import Service
from ringstone.state import PoolRecord, SqliteStore
from tests.framework.engine import FakeEngine


@dataclass
class Host:
    """One machine: directories that stay, and a gateway that can be started anew."""

    root: Path
    memory: Path
    store: SqliteStore
    engine: FakeEngine
    events: EventLog
    service: Service

    @classmethod
    def boot(cls, root: Path, memory: Path) -> "Host":
        store, engine, events = SqliteStore(root / "ringstone.db"), FakeEngine(), EventLog()
        service = Service(
            store,
            engine,
            events,
            run_dir=root / "run",
            state_dir=root,
            reactors=2,
            socket_dirs=(root / "sockets", memory),
        )
        return cls(root, memory, store, engine, events, service)

    def crash_and_restart(self) -> None:
        """The process is gone, with all that the engine had; the next one restores."""
        self.store.close()
        again = Host.boot(self.root, self.memory)
        self.store, self.engine, self.events, self.service = (
            again.store,
            again.engine,
            again.events,
            again.service,
        )
        self.service.restore()

    def pool(self, kind: str = "file", name: str = "p", capacity: int | None = None) -> PoolRecord:
        path = str(self.memory / name) if kind == "memory" else None
        return self.service.pools.create(PoolRecord(name, kind, path, capacity, 1))

    def files(self) -> list[str]:
        """Of all pools, by name."""
        return sorted(path.name for top in (self.root, self.memory) for path in top.rglob("*.raw"))

    def levels(self) -> list[tuple[str, str]]:
        """Of what is not merely information."""
        events = [event for event in self.events.latest(100) if event.level != "info"]
        return [(event.level, event.volume) for event in events]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    memory = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
    host = Host.boot(tmp_path, memory)
    yield host
    host.store.close()
    shutil.rmtree(memory)
