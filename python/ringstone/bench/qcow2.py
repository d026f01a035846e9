"""qcow2 files with 64 KiB clusters and sub-clusters, served by qemu-storage-daemon in the best of its modes."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringstone.bench import qemu
from ringstone.bench.process import last_line, pinned
from ringstone.bench.qemu import AioMode, QemuStorageDaemon
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Measurement, Shape, Window
from ringstone.errors import RingstoneError, UnsupportedError

IMG = "qemu-img"
IO = "qemu-io"
# All tables of what is measured here fit.
_CACHE_BYTES = 64 << 20
_OPTIONS = "cluster_size=64k,extended_l2=on,lazy_refcounts=on"
MODES = tuple(AioMode(aio, True) for aio in ("native", "io_uring", "threads"))

Snapshot = Literal["none", "internal", "external"]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RingstoneError(f"{command[0]} ended with {done.returncode}: {last_line(done.stderr)}")


def create(path: Path, size: int, backing: Path | None = None) -> None:
    """An empty file, or one over another."""
    over = ("-b", str(backing), "-F", "qcow2") if backing is not None else ()
    _run(IMG, "create", "-q", "-f", "qcow2", "-o", _OPTIONS, *over, str(path), str(size))


def snapshot(path: Path, name: str) -> None:
    """An internal one."""
    _run(IMG, "snapshot", "-c", name, str(path))


def write(path: Path, offsets: list[int], length: int) -> None:
    """So many bytes at each offset."""
    commands = [word for offset in offsets for word in ("-c", f"write -q {offset} {length}")]
    _run(IO, "-f", "qcow2", "-n", *commands, str(path))


@contextmanager
def serving(path: Path, mode: AioMode, setting: Setting, *, queues: int = 1) -> Iterator[QemuStorageDaemon]:
    """Run the daemon on a file, which may have others beneath it, bound to the server core."""
    cache = {"direct": True}
    blockdev = {
        "driver": "qcow2",
        "cache": cache,
        "l2-cache-size": _CACHE_BYTES,
        "discard": "unmap",
        "file": {
            "driver": "file",
            "filename": str(path),
            "aio": mode.aio,
            "cache": cache,
            "discard": "unmap",
        },
    }
    socket = setting.directory / "qcow2.sock"
    line = pinned(setting.cores.server, qemu.exporting(blockdev, socket, queues))
    with qemu.running(line, setting.directory):
        yield QemuStorageDaemon(socket, mode, setting.cores)


@dataclass(frozen=True, slots=True)
class Qcow2:
    """A file made anew for each measurement from `base`, which stays as it is, in the state that `snapshot` says; with
    no base an empty one of `size` bytes."""

    setting: Setting
    size: int
    mode: AioMode
    base: Path | None = None
    snapshot: Snapshot = "none"

    @property
    def name(self) -> str:
        state = {"none": "", "internal": " after an internal snapshot", "external": " over another"}
        return f"qcow2{state[self.snapshot]} (aio={self.mode.aio})"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        path = self.setting.disk / "qcow2"
        try:
            self._make(path)
            with serving(path, self.mode, self.setting, queues=shape.queues) as daemon:
                return daemon.measure(shape, window)
        finally:
            path.unlink(missing_ok=True)

    def _make(self, path: Path) -> None:
        if self.base is None or self.snapshot == "external":
            return create(path, self.size, self.base)
        _run("cp", "--reflink=auto", str(self.base), str(path))
        if self.snapshot == "internal":
            snapshot(path, "before")
        # What cp left in the page cache is none of what is measured.
        _run("sync", "-d", str(path))
        return None


def best(contenders: list[Qcow2], shape: Shape, window: Window, setting: Setting) -> Qcow2:
    """Whichever does most with this shape; one that does not start is told and left out."""
    reached: list[tuple[float, Qcow2]] = []
    for one in contenders:
        try:
            iops = one.measure(shape, window).iops
        except RingstoneError as error:
            setting.progress(f"{shape}: {one.name} is left out: {error}")
            continue
        setting.progress(f"{shape}: {one.name}: {iops:,.0f} IOPS")
        reached.append((iops, one))
    if not reached:
        raise UnsupportedError(
            "qemu-storage-daemon serves no qcow2 file. Start it by hand on one to see why."
        )
    return max(reached, key=lambda pair: pair[0])[1]
