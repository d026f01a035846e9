"""One shape, chosen by hand: what `ringstone bench gateway` and `ringstone bench limit` run."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringstone.bench import files, hugepages
from ringstone.bench.compare import Rounds, compare
from ringstone.bench.fio import Fio
from ringstone.bench.gateway import EngineProcess, Gateway
from ringstone.bench.load import BareRing, Socket
from ringstone.bench.machine import filesystem_of
from ringstone.bench.qemu import serving
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Contender, Shape
from ringstone.bench.suite import best_mode
from ringstone.errors import InvalidError, NoDeviceError

VolumeType = Literal["memory", "file", "null"]
Reference = Literal["limit", "qemu-storage-daemon", "fio"]


@dataclass(frozen=True, slots=True)
class Subject:
    """What to measure: somebody's `socket`, or a volume of an engine that is started for this. `file` is the
    file volume's; it is made for the measurement unless it exists, and an existing one is written to only
    with `overwrite`."""

    socket: Path | None = None
    volume: VolumeType = "memory"
    file: Path | None = None
    overwrite: bool = False
    against: Reference | None = None


def limit(shape: Shape, setting: Setting) -> Rounds:
    """The bare ring alone."""
    with setting.ahead(), hugepages.reserved(hugepages.pages_for(setting.size) + 2):
        (rounds,) = compare([(BareRing(setting.cores, setting.size), shape)], setting.plan, setting.progress)
    return rounds


def gateway(subject: Subject, shape: Shape, setting: Setting) -> tuple[Rounds, ...]:
    """The reference's rounds, if there is one, and then the subject's. InvalidError for what does not go
    together."""
    if subject.socket is not None and subject.against in ("qemu-storage-daemon", "fio"):
        raise InvalidError(f"--against {subject.against} needs the file, so it does not go with --socket.")
    with ExitStack() as stack:
        file = _file(subject, shape, setting, stack)
        if file is None or filesystem_of(file) == "tmpfs":
            stack.enter_context(setting.ahead())
        else:
            shape = shape.on_drive()
        pages = hugepages.pages_for(setting.size, setting.size) + 8
        stack.enter_context(hugepages.reserved(pages))
        contender = _subject(subject, file, shape, setting, stack)
        reference = _reference(subject, file, shape, setting, stack)
        pair = [(one, shape) for one in (reference, contender) if one is not None]
        return compare(pair, setting.plan, setting.progress)


def _file(subject: Subject, shape: Shape, setting: Setting, stack: ExitStack) -> Path | None:
    needed = subject.volume == "file" or subject.against in ("qemu-storage-daemon", "fio")
    if not needed or subject.socket is not None:
        return None
    if subject.volume != "file":
        raise InvalidError(f"--against {subject.against} compares one file: add --volume-type file.")
    path = subject.file or setting.directory / "volume"
    if not path.exists():
        return stack.enter_context(files.filled(path, setting.size))
    if shape.read_share < 100 and not subject.overwrite:
        raise InvalidError(
            f"{path} exists, and this would overwrite what it holds. Add --overwrite, or only read."
        )
    return path


def _size_of(file: Path) -> int:
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
    if size == 0:
        raise NoDeviceError(f"{file} is empty. Give a file or block device with data, or a path to make.")
    return size


def _subject(
    subject: Subject, file: Path | None, shape: Shape, setting: Setting, stack: ExitStack
) -> Contender:
    if subject.socket is not None:
        return Socket(subject.socket, setting.cores)
    size = setting.size if file is None else _size_of(file)
    engine = stack.enter_context(EngineProcess(setting.directory, [setting.cores.server]))
    backends = {
        "memory": {"type": "memory", "path": None},
        "null": {"type": "null"},
        "file": {"type": "file", "path": str(file)},
    }
    socket = engine.serve(
        "bench", json.dumps(backends[subject.volume]), size=size, queues=max(shape.queues, 1)
    )
    if subject.volume == "memory":
        files.fill_volume(socket, size, setting.cores)
    return Gateway(engine, "bench", setting.cores)


def _reference(
    subject: Subject, file: Path | None, shape: Shape, setting: Setting, stack: ExitStack
) -> Contender | None:
    match subject.against:
        case None:
            return None
        case "limit":
            return BareRing(setting.cores, setting.size)
        case "fio":
            assert file is not None, "_file sees to it"
            return Fio(file, setting.cores)
        case "qemu-storage-daemon":
            assert file is not None, "_file sees to it"
            mode = best_mode(file, shape, setting, direct_only=filesystem_of(file) != "tmpfs")
            return stack.enter_context(
                serving(file, mode, setting.cores, setting.directory, queues=shape.queues)
            )
