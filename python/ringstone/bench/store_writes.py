"""First writes: after a snapshot, into an empty volume, in order. Beside overwrites, qcow2 and the bare file."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ringstone.bench import files, qcow2, store_drive
from ringstone.bench.compare import Rounds, compare, limited_by
from ringstone.bench.gateway import Gateway
from ringstone.bench.qcow2 import Qcow2, Snapshot
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Measurement, Shape, Window
from ringstone.bench.spread import Bar
from ringstone.bench.store_drive import StoreDrive

VOLUME = "fresh"
# First writes run out: the windows are short, and there is nothing to warm up.
MOST_SECONDS = 0.5
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Fresh:
    """A volume that is made for each measurement and removed after it: empty, or written all over and then given a
    snapshot."""

    drive: StoreDrive
    setting: Setting
    size: int
    snapshot: bool = False

    @property
    def name(self) -> str:
        return "ringstone"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        self.drive.create(VOLUME, self.size)
        snapshots = ["before"] if self.snapshot else []
        socket = self.drive.serve(VOLUME, self.size, queues=shape.queues)
        try:
            if self.snapshot:
                files.fill_volume(socket, self.size, self.setting.cores)
                self.drive.command("snapshot", volumes=[VOLUME], name="before")
            return Gateway(self.drive.engine, VOLUME, self.setting.cores).measure(shape, window)
        finally:
            self.drive.remove(VOLUME, snapshots)


def first_share(writes: float, blocks: int) -> float:
    """Of so many writes to random blocks, the share that meets a block for the first time."""
    return blocks * -math.expm1(-writes / blocks) / writes if writes else 1.0


def _short(setting: Setting) -> Setting:
    window = Window(min(setting.plan.window.seconds, MOST_SECONDS), 0.0)
    return replace(setting, plan=replace(setting.plan, window=window))


def _repeats(rounds: Rounds, blocks: int) -> str:
    shares = [first_share(float(one.raw["operations"]), blocks) for one in rounds.measurements]
    return f"{min(shares):.0%} of the writes or more were first ones; {limited_by(rounds, device=True)}"


def _iops(rounds: Rounds) -> list[float]:
    return [one.iops for one in rounds.measurements]


def after_snapshot(setting: Setting, results: Results) -> None:
    """Plain overwrites, then first writes after a snapshot, of the store and of qcow2."""
    size = setting.size
    setting = _short(setting)
    section = f"the first write of a block after a snapshot, {size >> 20} MiB, 4 KiB"
    blocks = size // 4096
    with store_drive.opened(setting, 3 * size) as drive, _qcow2_base(setting, size) as base:
        drive.create("steady", size)
        socket = drive.serve("steady", size)
        files.fill_volume(socket, size, setting.cores)
        plain = Gateway(drive.engine, "steady", setting.cores, "overwrites")
        fresh = Fresh(drive, setting, size, snapshot=True)
        states: tuple[Snapshot, ...] = ("internal", "external")
        for depth in (1, 32):
            shape = Shape(depth=depth).writing().on_drive()
            peers = [Qcow2(setting, size, mode, base, state) for mode in qcow2.MODES for state in states]
            peer = qcow2.best(peers, shape, setting.plan.settle, setting)
            theirs_plain = replace(peer, snapshot="none")
            taken = compare(
                [(theirs_plain, shape), (peer, shape), (plain, shape), (fresh, shape)],
                setting.plan,
                setting.progress,
            )
            results.keep(section, *taken)
            results.rows += first_rows(section, taken, blocks)


def first_rows(section: str, taken: tuple[Rounds, ...], blocks: int) -> list[Row]:
    """`taken`: qcow2's overwrites and first writes, and ours."""
    peer_plain, peer, plain, ours = taken
    why = _repeats(ours, blocks)
    rows = []
    if ours.shape.depth == 1:
        means = [one.mean_ns for one in ours.measurements]
        beside = (plain.name, [one.mean_ns for one in plain.measurements])
        bar = Bar("at most 2 times an overwrite", at_most=2.0)
        rows.append(Row.beside(section, f"{ours.shape}: mean", "ns", means, beside, why, bar))
        bar5 = None
    else:
        bar = Bar("at least half of overwrites", at_least=0.5)
        beside = (plain.name, _iops(plain))
        rows.append(Row.beside(section, f"{ours.shape}: IOPS", "IOPS", _iops(ours), beside, why, bar))
        bar5 = Bar("at least 5 times qcow2", at_least=5.0)
    reference = (peer.name, _iops(peer))
    rows.append(Row.beside(section, f"{ours.shape}: IOPS", "IOPS", _iops(ours), reference, why, bar5))
    what = f"{ours.shape}: IOPS of qcow2, beside its own overwrites"
    own = (peer_plain.name, _iops(peer_plain))
    rows.append(Row.beside(section, what, "IOPS", _iops(peer), own, _repeats(peer, blocks)))
    return rows


@contextmanager
def _qcow2_base(setting: Setting, size: int) -> Iterator[Path]:
    """A file that is written all over, for others to lie over it."""
    path = setting.disk / "qcow2-base"
    try:
        qcow2.create(path, size)
        with qcow2.serving(path, qcow2.MODES[0], setting) as daemon:
            files.fill_volume(daemon.socket, size, setting.cores)
        yield path
    finally:
        path.unlink(missing_ok=True)


def filling(setting: Setting, results: Results) -> None:
    """Empty volumes: at random beside qcow2, in order beside the bare file."""
    size = setting.size
    setting = _short(setting)
    section = f"filling an empty volume, {size >> 20} MiB"
    # Room for the longest window of a fast drive, so that what is written in order never begins again.
    room = 4 * size
    with store_drive.opened(setting, room) as drive:
        shape = Shape(depth=32).writing().on_drive()
        peers = [Qcow2(setting, size, mode) for mode in qcow2.MODES]
        peer = qcow2.best(peers, shape, setting.plan.settle, setting)
        theirs, ours = compare(
            [(peer, shape), (Fresh(drive, setting, size), shape)], setting.plan, setting.progress
        )
        results.keep(section, theirs, ours)
        results.rows.append(
            Row.beside(
                section,
                f"{shape}: IOPS",
                "IOPS",
                _iops(ours),
                (theirs.name, _iops(theirs)),
                _repeats(ours, size // 4096),
                Bar("at least 3 times qcow2", at_least=3.0),
            )
        )
        _in_order(section, drive, room, setting, results)


def _in_order(section: str, drive: StoreDrive, room: int, setting: Setting, results: Results) -> None:
    shape = Shape(depth=4, block_size=_MIB, pattern="sequential").writing().on_drive()
    with (
        files.filled(setting.disk / "file", setting.size) as file,
        store_drive.started(setting, "file") as engine,
    ):
        backend = json.dumps({"type": "file", "path": str(file)})
        engine.serve("file", backend, size=setting.size)
        bare = Gateway(engine, "file", setting.cores, "file")
        theirs, ours = compare(
            [(bare, shape), (Fresh(drive, setting, room), shape)], setting.plan, setting.progress
        )
    results.keep(section, theirs, ours)
    again = max(one.raw["bytes"] for one in ours.measurements) / room
    results.rows.append(
        Row.beside(
            section,
            f"{shape}: throughput",
            "MiB/s",
            _iops(ours),
            (theirs.name, _iops(theirs)),
            f"at most {again:.0%} of the volume was written; {limited_by(ours, device=True)}",
            Bar("at least 0.9 of the bare file", at_least=0.9),
        )
    )
