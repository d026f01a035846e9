"""What clients notice of snapshots, and of the deletion of one; how long a clone takes."""

import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ringstone.bench import files, store_drive
from ringstone.bench.pattern import running_pattern, sound
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.spread import Bar, Spread
from ringstone.bench.stalls import Seen, watched
from ringstone.bench.store_drive import StoreDrive

QUEUES = 4
DEPTH = 32
TIB = 1 << 40
GIB = 1 << 30
SNAPSHOTS_A_SECOND = 10
# What the clients use of a volume: small, so that it is soon read back.
SPAN_BYTES = 64 << 20
GAP = Bar("at most 10 ms", at_most=10.0)
CLONE = Bar("at most 20 ms", at_most=20.0)
DELETION = Bar("at most 1.2 times", at_most=1.2)
DELETED_BYTES = 10 * GIB
# Left on the drive for others.
_SPARE_BYTES = 8 * GIB


def _job(setting: Setting) -> dict[str, Any]:
    # No flushes: how long one takes is the drive's affair and not a pause.
    return {
        "queues": QUEUES,
        "depth": DEPTH,
        "flush_share": 0,
        "span_bytes": SPAN_BYTES,
        "cores": [setting.cores.client],
    }


def snapshots(setting: Setting, results: Results) -> None:
    """Snapshots under full load, of a small volume and of a large one; clones of the large one."""
    section = f"snapshots under load, {QUEUES} queues, depth {DEPTH} in each"
    with store_drive.opened(setting, 4 * setting.size) as drive:
        for name, size in ((f"{setting.size >> 20} MiB", setting.size), ("1 TiB, thin", TIB)):
            _gaps(section, name, drive, size, setting, results)
        _clones(drive, setting, results)


def _gaps(section: str, name: str, drive: StoreDrive, size: int, setting: Setting, results: Results) -> None:
    drive.create("volume", size)
    socket = drive.serve("volume", size, queues=QUEUES)
    if size <= setting.size:
        files.fill_volume(socket, size, setting.cores)
    seconds = setting.plan.window.seconds
    alone: list[Seen] = []
    taken: list[Seen] = []
    commands: list[list[float]] = []
    for turn in range(setting.plan.rounds):
        alone.append(watched([socket], _job(setting), partial(time.sleep, seconds))[0])
        seen, took = watched([socket], _job(setting), partial(_take_snapshots, drive, seconds))
        taken.append(seen)
        commands.append(took)
        for number in range(len(took)):
            drive.command("delete_snapshot", volume="volume", name=f"s{number}")
        drive.wait_reclaimed()
        setting.progress(f"snapshots of {name}: round {turn + 1}/{setting.plan.rounds}: {seen.gap_ms:.2f} ms")
    drive.remove("volume")
    raw = [
        {"alone": asdict(a), "with_snapshots": asdict(b), "commands_ms": c}
        for a, b, c in zip(alone, taken, commands, strict=True)
    ]
    results.keep_raw(section, f"ringstone, {name}", _job(setting), raw)
    slowest = max(max(took) for took in commands)
    results.rows += [
        Row.beside(
            section,
            f"{name}: longest gap of the client",
            "ms",
            [seen.gap_ms for seen in taken],
            ("without snapshots", [seen.gap_ms for seen in alone]),
            f"{SNAPSHOTS_A_SECOND} snapshots a second, {min(map(len, commands))} and more in a window",
            GAP,
            judge="figure",
        ),
        Row.told(
            section,
            f"{name}: the command",
            "ms",
            [median(took) for took in commands],
            f"{slowest:.1f} ms at most; it waits for requests under way, and for its record to be durable",
        ),
    ]


def _take_snapshots(drive: StoreDrive, seconds: float) -> list[float]:
    """How long each took, in milliseconds."""
    took: list[float] = []
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        took.append(drive.timed("snapshot", volumes=["volume"], name=f"s{len(took)}")[1] / 1e6)
        time.sleep(max(0.0, began + len(took) / SNAPSHOTS_A_SECOND - time.monotonic()))
    return took


def _clones(drive: StoreDrive, setting: Setting, results: Results) -> None:
    section = "clones of a thin volume of 1 TiB"
    drive.create("parent", TIB)
    socket = drive.serve("parent", TIB)
    with running_pattern(str(socket), **_job(setting) | {"queues": 1}):
        time.sleep(setting.plan.window.seconds)
    drive.command("snapshot", volumes=["parent"], name="s")
    took: dict[str, list[float]] = {"of a snapshot": [], "of a running volume": []}
    for turn in range(setting.plan.rounds):
        for what, snapshot in (("of a snapshot", "s"), ("of a running volume", None)):
            name = f"clone-{turn}-{snapshot}"
            _, ns = drive.timed("clone", volume="parent", snapshot=snapshot, name=name)
            took[what].append(ns / 1e6)
    results.keep_raw(section, "ringstone", {}, [took])
    for what, values in took.items():
        results.rows.append(
            Row.absolute(
                section, f"a clone {what}", "ms", Spread.of(values), CLONE, "its record has to be durable"
            )
        )


@dataclass(frozen=True, slots=True)
class Deletion:
    """p99 of the client while a snapshot was deleted, and of the same client left alone for as long after it."""

    with_ns: float
    alone_ns: float
    seconds: float


def room_for_deletion(wanted: int, free: int) -> int:
    """Bytes that a snapshot can hold where so many are free on the drive: the volume is there twice."""
    return min(wanted, max(0, free - _SPARE_BYTES) // 2)


def deletion(setting: Setting, results: Results) -> None:
    """A snapshot that alone holds all of a volume that was overwritten since."""
    wanted = DELETED_BYTES if setting.size >= GIB else setting.size
    size = min(wanted, room_for_deletion(wanted, shutil.disk_usage(setting.disk).free)) >> 20 << 20
    section = f"deleting a snapshot that holds {size / GIB:.3g} GiB, under load"
    if size < wanted:
        results.notes.append(
            f"Deletion: the drive has room for a snapshot of {size / GIB:.3g} GiB instead of {wanted >> 30}."
        )
    measured: list[Deletion] = []
    with ExitStack() as stack:
        drive = stack.enter_context(store_drive.preallocated(setting, 2 * size + (1 << 30)))
        drive.create("volume", size)
        socket = drive.serve("volume", size, queues=QUEUES)
        files.fill_volume(socket, size, setting.cores)
        for turn in range(setting.plan.rounds):
            drive.command("snapshot", volumes=["volume"], name="large")
            files.fill_volume(socket, size, setting.cores)
            measured.append(_delete(drive, socket, setting))
            one = measured[-1]
            setting.progress(
                f"deletion: round {turn + 1}/{setting.plan.rounds}: {one.seconds:.2f} s, p99 "
                f"{one.with_ns / 1e3:,.0f} us, alone {one.alone_ns / 1e3:,.0f} us"
            )
    results.keep_raw(section, "ringstone", _job(setting), [asdict(one) for one in measured])
    results.rows.append(
        Row.beside(
            section,
            "p99 of the client",
            "us",
            [one.with_ns / 1e3 for one in measured],
            ("left alone", [one.alone_ns / 1e3 for one in measured]),
            f"the deletion took {median(one.seconds for one in measured):.2f} s",
            DELETION,
        )
    )


def _delete(drive: StoreDrive, socket: Path, setting: Setting) -> Deletion:
    job = _job(setting)
    with running_pattern(str(socket), **job) as client:
        began = time.monotonic()
        drive.command("delete_snapshot", volume="volume", name="large")
        drive.wait_reclaimed()
        seconds = time.monotonic() - began
    deleted = sound(client.report).latency.p99_ns
    with running_pattern(str(socket), **job) as client:
        time.sleep(max(seconds, setting.plan.window.seconds))
    return Deletion(deleted, sound(client.report).latency.p99_ns, seconds)
