"""qemu-storage-daemon serving the same file with the same protocol."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringstone.bench.load import drive
from ringstone.bench.process import LineProcess, pinned
from ringstone.bench.shape import Cores, Measurement, Shape, Window
from ringstone.errors import RingstoneError

PROGRAM = "qemu-storage-daemon"


@dataclass(frozen=True, slots=True)
class AioMode:
    """How it does its I/O: `aio` is threads, native (Linux AIO, which needs O_DIRECT) or io_uring."""

    aio: str
    direct: bool

    def __str__(self) -> str:
        return f"aio={self.aio}, cache.direct={'on' if self.direct else 'off'}"


def modes(*, direct_only: bool) -> tuple[AioMode, ...]:
    """Every mode, or with `direct_only` those that bypass the page cache."""
    direct = tuple(AioMode(aio, True) for aio in ("threads", "native", "io_uring"))
    return direct if direct_only else (*direct, AioMode("threads", False), AioMode("io_uring", False))


def command(file: Path, socket: Path, mode: AioMode, queues: int) -> list[str]:
    blockdev = {
        "driver": "file",
        "filename": str(file),
        "aio": mode.aio,
        "cache": {"direct": mode.direct},
        "discard": "unmap",
        # The gateway has the file too; only one of the two is under load at a time.
        "locking": "off",
    }
    return exporting(blockdev, socket, queues)


def exporting(blockdev: dict[str, Any], socket: Path, queues: int) -> list[str]:
    """Serve a block device. The monitor comes last: its greeting says that the export is there."""
    export = {
        "type": "vhost-user-blk",
        "id": "export",
        "node-name": "disk",
        "addr": {"type": "unix", "path": str(socket)},
        "writable": True,
        "num-queues": queues,
        "iothread": "iothread",
    }
    return [
        PROGRAM,
        "--object",
        "iothread,id=iothread",
        "--blockdev",
        json.dumps(blockdev | {"node-name": "disk"}),
        "--export",
        json.dumps(export),
        "--chardev",
        "stdio,id=monitor",
        "--monitor",
        "monitor",
    ]


@dataclass(frozen=True, slots=True)
class QemuStorageDaemon:
    """A running daemon."""

    socket: Path
    mode: AioMode
    cores: Cores

    @property
    def name(self) -> str:
        return f"qemu-storage-daemon ({self.mode})"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        return Measurement.of(drive(self.socket, shape, window, self.cores))


@contextmanager
def serving(
    file: Path, mode: AioMode, cores: Cores, directory: Path, *, queues: int = 1
) -> Iterator[QemuStorageDaemon]:
    """Run the daemon on `file`, bound to the server core. RingstoneError when it does not start."""
    socket = directory / f"qemu-{mode.aio}-{'direct' if mode.direct else 'cached'}.sock"
    with running(pinned(cores.server, command(file, socket, mode, queues)), directory):
        yield QemuStorageDaemon(socket, mode, cores)


@contextmanager
def running(line: Sequence[str], directory: Path) -> Iterator[LineProcess]:
    """A daemon by its command line. RingstoneError when it does not start."""
    with LineProcess(line, log=directory / "qemu.log") as daemon:
        greeting = daemon.receive()
        if "QMP" not in greeting:
            raise RingstoneError(f"{PROGRAM} answered {greeting} where its greeting was expected.")
        try:
            yield daemon
        finally:
            daemon.send({"execute": "qmp_capabilities"})
            daemon.send({"execute": "quit"})
