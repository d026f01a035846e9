"""The gateway's engine under test, on a core of its own, in a process of its own."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ringstone.bench.load import drive
from ringstone.bench.process import LineProcess, module_command
from ringstone.bench.shape import Cores, Measurement, ReactorUse, Shape, Window
from ringstone.errors import error_of_code
from ringstone.stats import Snapshot, StatsPage

IDLE_US = 200


class EngineProcess:
    """An engine that serves on `cores`. `directory` takes its sockets, log and stats page; tmpfs is best."""

    def __init__(
        self,
        directory: Path,
        cores: list[int],
        *,
        idle_us: int = IDLE_US,
        balance: bool = True,
        python_path: Path | None = None,
    ) -> None:
        """`python_path`: another Ringstone to run, as `pip install --target` makes it."""
        self._directory = directory
        stats = directory / "stats"
        environment = {"PYTHONPATH": str(python_path)} if python_path is not None else {}
        self._lines = LineProcess(
            module_command("server"), log=directory / "engine.log", environment=environment
        )
        arguments = {"cores": cores, "idle_us": idle_us, "stats_path": str(stats), "balance": balance}
        self._lines.send(arguments)
        try:
            self._take_answer()
            self._stats = StatsPage(stats)
        except BaseException:
            self._lines.close()
            raise

    @property
    def pid(self) -> int:
        return self._lines.pid

    def call(self, what: str, **arguments: Any) -> Any:
        """Call the engine: "open", "attach", ... as in `ringstone.bench.server`. RingstoneError of the
        engine's code."""
        return self.timed_call(what, **arguments)[0]

    def timed_call(self, what: str, **arguments: Any) -> tuple[Any, int]:
        """Also how long the engine took, in nanoseconds."""
        self._lines.send({"do": what, **arguments})
        return self._take_answer()

    def _take_answer(self) -> tuple[Any, int]:
        answer = self._lines.receive()
        if "error" in answer:
            raise error_of_code(answer["code"], answer["error"])
        return answer["result"], answer["took_ns"]

    def snapshot(self) -> Snapshot:
        return self._stats.read()

    def socket_of(self, volume: str) -> Path:
        return self._directory / f"{volume}.sock"

    def serve(
        self,
        volume: str,
        backend: str,
        *,
        size: int,
        block_size: int = 512,
        queues: int = 1,
        key: str | None = None,
    ) -> Path:
        """Open and attach a volume; the socket it listens on. `key`: hexadecimal digits, of one that is encrypted."""
        socket = self.socket_of(volume)
        self.call("open", name=volume, backend=backend, size=size, block_size=block_size, key=key)
        self.call("attach", name=volume, socket_path=str(socket), queues=queues)
        return socket

    def withdraw(self, volume: str) -> None:
        """Detach and close a volume."""
        self.call("detach", name=volume, force=True)
        self.call("close", name=volume)

    def close(self) -> None:
        self._stats.close()
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Gateway:
    """A volume that the engine serves."""

    engine: EngineProcess
    volume: str
    cores: Cores
    name: str = "ringstone"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        before = self.engine.snapshot()
        report = drive(self.engine.socket_of(self.volume), shape, window, self.cores)
        return Measurement.of(report, reactor_use(before, self.engine.snapshot(), report.iops))


def reactor_use(before: Snapshot, after: Snapshot, iops: float) -> ReactorUse | None:
    """Busy time of all reactors for each request between two readings, and the share of one reactor's time
    that this is at `iops`. None when no request was counted."""
    busy = sum(reactor.busy_ns for reactor in after.reactors) - sum(
        reactor.busy_ns for reactor in before.reactors
    )
    operations = sum(queue.operations for queue in after.queues) - sum(
        queue.operations for queue in before.queues
    )
    if operations <= 0:
        return None
    reactors = max(len(after.reactors), 1)
    return ReactorUse(busy / operations, min(1.0, busy / operations * iops / 1e9 / reactors))
