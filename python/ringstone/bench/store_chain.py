"""Reads of a volume with many snapshots, beside one with none; before and after the store was opened anew."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ringstone.bench import files, qcow2, store_drive
from ringstone.bench.compare import Rounds, compare, limited_by
from ringstone.bench.gateway import Gateway
from ringstone.bench.process import run_job
from ringstone.bench.qcow2 import Qcow2
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Shape
from ringstone.bench.spread import Bar
from ringstone.bench.store_drive import StoreDrive
from ringstone.errors import StorageError

SNAPSHOTS = 64
# Blocks that are written between two snapshots.
BETWEEN = 128
_BLOCK = 4096
# Each block that is written first after a snapshot takes an extent.
_EXTENT = 64 << 10
MOST = Bar("at most 1.03 times as long", at_most=1.03)


def offsets_of(layer: int, size: int) -> list[int]:
    """The blocks that are written after snapshot `layer`, the same for everybody."""
    blocks = random.Random(layer)
    return [blocks.randrange(size // _BLOCK) * _BLOCK for _ in range(BETWEEN)]


def write_blocks(socket: Path, offsets: list[int]) -> None:
    """StorageError when one is refused."""
    operations = [
        {"op": "write", "offset": offset, "len": _BLOCK, "fill": {"seed": offset}} for offset in offsets
    ]
    report = run_job("load", {"mode": "script", "socket": str(socket), "operations": operations, "depth": 8})
    bad = [one["status"] for one in report["results"] if one["status"] != "ok"]
    if bad or len(report["results"]) != len(offsets):
        raise StorageError(
            f"Writing to {socket} was answered with {bad[:1] or 'nothing'}. See the engine's log."
        )


def chain(setting: Setting, results: Results) -> None:
    """Both volumes hold the same: all of it written in order, then some blocks of it again, for the one after each of
    its snapshots."""
    section = (
        f"reads with {SNAPSHOTS} snapshots, {setting.size >> 20} MiB, {BETWEEN} blocks written after each"
    )
    room = 2 * setting.size + SNAPSHOTS * BETWEEN * _EXTENT + (64 << 20)
    with ExitStack() as stack:
        drive = stack.enter_context(store_drive.opened(setting, room))
        for name in ("none", "chain"):
            drive.create(name, setting.size)
            socket = drive.serve(name, setting.size)
            files.fill_volume(socket, setting.size, setting.cores)
            for layer in range(SNAPSHOTS):
                if name == "chain":
                    drive.command("snapshot", volumes=[name], name=f"s{layer}")
                write_blocks(socket, offsets_of(layer, setting.size))
            setting.progress(f"volume {name!r} is written")
        for depth in (1, 32):
            shape = Shape(depth=depth)
            results.rows += _rows(section, drive, shape, setting, results, "")
        for name in ("none", "chain"):
            drive.engine.withdraw(name)
        drive.close()
        took = drive.open()
        setting.progress(f"opened anew in {took / 1e6:.1f} ms")
        for name in ("none", "chain"):
            drive.serve(name, setting.size)
        for depth in (1, 32):
            shape = Shape(depth=depth)
            results.rows += _rows(section, drive, shape, setting, results, " after the store was opened anew")
    _qcow2(section, setting, results)


def _rows(
    section: str, drive: StoreDrive, shape: Shape, setting: Setting, results: Results, when: str
) -> list[Row]:
    none, ours = (Gateway(drive.engine, name, setting.cores, name) for name in ("none", "chain"))
    theirs, taken = compare(
        [(replace(none, name="no snapshots"), shape), (replace(ours, name="ringstone"), shape)],
        setting.plan,
        setting.progress,
    )
    results.keep(section + when, theirs, taken)
    return [_row(section, f"{shape}: mean{when}", theirs, taken, MOST)]


def _row(section: str, what: str, theirs: Rounds, ours: Rounds, bar: Bar | None) -> Row:
    return Row.beside(
        section,
        what,
        "ns",
        [one.mean_ns for one in ours.measurements],
        (theirs.name, [one.mean_ns for one in theirs.measurements]),
        limited_by(ours, device=True),
        bar,
    )


def _qcow2(section: str, setting: Setting, results: Results) -> None:
    """A chain of files, as external snapshots make it: reads go through them one by one. Internal snapshots do not slow
    reads down, and nobody else can read them."""
    with _qcow2_chain(setting) as (alone, top):
        for depth in (1, 32):
            shape = Shape(depth=depth)
            peers = [Qcow2(setting, setting.size, mode, alone, "external") for mode in qcow2.MODES]
            one = qcow2.best(peers, shape, setting.plan.settle, setting)
            taken = compare([(one, shape), (replace(one, base=top), shape)], setting.plan, setting.progress)
            theirs, chained = (
                replace(rounds, name=name)
                for rounds, name in zip(taken, ("qcow2 over one file", "qcow2 chain"), strict=True)
            )
            results.keep(section, theirs, chained)
            results.rows.append(_row(section, f"{shape}: mean of a qcow2 chain", theirs, chained, None))


@contextmanager
def _qcow2_chain(setting: Setting) -> Iterator[tuple[Path, Path]]:
    """A file that is written all over, and the uppermost of the chain over it."""
    paths = [setting.disk / f"qcow2-{layer}" for layer in range(SNAPSHOTS + 1)]
    try:
        qcow2.create(paths[0], setting.size)
        with qcow2.serving(paths[0], qcow2.MODES[0], setting) as daemon:
            files.fill_volume(daemon.socket, setting.size, setting.cores)
        for layer, (below, path) in enumerate(pairwise(paths)):
            qcow2.create(path, setting.size, below)
            qcow2.write(path, offsets_of(layer, setting.size), _BLOCK)
        setting.progress("the qcow2 chain is written")
        yield paths[0], paths[-1]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
