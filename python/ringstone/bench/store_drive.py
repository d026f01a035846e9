"""A store on a file of the drive that is measured, as the benchmarks' engine has it open."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ringstone.bench import files
from ringstone.bench.gateway import EngineProcess
from ringstone.bench.setting import Setting
from ringstone.errors import RingstoneError

# What a store needs beyond the extents that are written: journal, catalog, table.
OVERHEAD = 64 << 20
_QUIET_SECONDS = 120.0
_LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class StoreDrive:
    """An open store."""

    engine: EngineProcess
    path: Path

    def command(self, op: str, **fields: Any) -> Any:
        return self.timed(op, **fields)[0]

    def timed(self, op: str, **fields: Any) -> tuple[Any, int]:
        """Also how long the engine took, in nanoseconds."""
        return self.engine.timed_call("command", path=str(self.path), command={"op": op, **fields})

    def create(self, volume: str, size: int) -> None:
        self.command("create", name=volume, size=size)

    def create_encrypted(self, volume: str, size: int, key: str) -> None:
        """`key`: of the pool, 64 hexadecimal digits."""
        self.engine.call(
            "create_encrypted", path=str(self.path), name=volume, size=size, integrity=False, key=key
        )

    def serve(self, volume: str, size: int, *, queues: int = 1, key: str | None = None) -> Path:
        """Attach a volume that is there; the socket it listens on."""
        return self.engine.serve(volume, self.backend(volume), size=size, queues=queues, key=key)

    def backend(self, volume: str) -> str:
        """As the engine takes it."""
        return json.dumps({"type": "store", "path": str(self.path), "volume": volume})

    def remove(self, volume: str, snapshots: Sequence[str] = ()) -> None:
        """Withdraw and delete a volume, and wait until all that it had is free."""
        self.engine.withdraw(volume)
        for snapshot in snapshots:
            self.command("delete_snapshot", volume=volume, name=snapshot)
        self.command("delete", name=volume)
        self.wait_reclaimed()

    def wait_reclaimed(self) -> None:
        """Until nothing is on its way to be free. RingstoneError when that takes too long."""
        end = time.monotonic() + _QUIET_SECONDS
        while self.command("figures")["reclaiming"]:
            if time.monotonic() > end:
                raise RingstoneError("The store frees nothing any more. See the engine's log.")
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        self.engine.call("close_store", path=str(self.path))

    def open(self) -> int:
        """How long it took, in nanoseconds."""
        return self.engine.timed_call("open_store", path=str(self.path))[1]


@contextmanager
def started(setting: Setting, name: str) -> Iterator[EngineProcess]:
    """An engine of its own, so that no other is asked for its store's sake, or sleeps less."""
    with (
        TemporaryDirectory(prefix=f"{name}-", dir=setting.directory) as directory,
        EngineProcess(Path(directory), [setting.cores.server]) as engine,
    ):
        yield engine


@contextmanager
def opened(setting: Setting, size: int, name: str = "store") -> Iterator[StoreDrive]:
    """A new store with room for `size` bytes of extents, open in an engine of its own. The file is written all over
    first, so that it behaves as a drive does: the file system has nothing to allocate or to convert."""
    with files.filled(setting.disk / name, size + OVERHEAD) as path, opened_on(setting, path) as drive:
        yield drive


@contextmanager
def opened_on(setting: Setting, path: Path) -> Iterator[StoreDrive]:
    """A new store on a file that is there, which loses what it had, open in an engine of its own."""
    with started(setting, path.name) as engine:
        engine.call("format_store", path=str(path))
        drive = StoreDrive(engine, path)
        drive.open()
        yield drive


@contextmanager
def preallocated(setting: Setting, size: int, name: str = "store") -> Iterator[StoreDrive]:
    """The same on a file that is only allocated, as a pool makes it: for what does not measure first writes."""
    path = setting.disk / name
    with started(setting, name) as engine:
        try:
            engine.call("format_store", path=str(path), size=size + OVERHEAD)
            drive = StoreDrive(engine, path)
            drive.open()
            yield drive
        finally:
            path.unlink(missing_ok=True)
