"""Reads and overwrites of a volume with checksums, or an encrypted one, beside one without, of the same store."""

import re
import subprocess
from collections.abc import Sequence
from statistics import median

from ringstone.bench import files, store_drive
from ringstone.bench.compare import Rounds, compare
from ringstone.bench.gateway import Gateway
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Shape
from ringstone.bench.spread import Bar, Spread
from ringstone.bench.store_steady import iops_row
from ringstone.errors import FailedError

_SHAPES = (Shape(depth=1), Shape(depth=32), Shape(depth=32, queues=4))
_LARGE = Shape(depth=4, block_size=1 << 20)
_QUEUES = 4
_LEAST_SUMS = Bar("at least 0.8 of without, at depth 32", at_least=0.8)
_LEAST_ENCRYPTED = Bar("at least 0.7 of without", at_least=0.7)
_LEAST_A_CORE = Bar("at least 2 GiB/s a core", at_least=2.0)
_KEY = "5a" * 32


def integrity(setting: Setting, results: Results) -> None:
    """Both are served by one engine and written all over before."""
    section = f"checksums, {setting.size >> 20} MiB, beside a volume without"
    with store_drive.opened(setting, 2 * setting.size) as drive:
        for name, kept in (("without", False), ("with", True)):
            drive.command("create", name=name, size=setting.size, integrity=kept)
        contenders = _filled(drive, setting)
        for shape in _both(_SHAPES):
            theirs, ours = _measured(contenders, shape, setting, results, section)
            results.rows.append(iops_row(section, theirs, ours, _LEAST_SUMS if shape.depth > 1 else None))


def encryption(setting: Setting, results: Results) -> None:
    """As integrity(). How fast a core encrypts is told by what a reactor was busy with 1 MiB, beside what OpenSSL does
    in a loop on the same core."""
    section = f"encryption, {setting.size >> 20} MiB, beside a volume without"
    with store_drive.opened(setting, 2 * setting.size) as drive:
        drive.create("without", setting.size)
        drive.create_encrypted("with", setting.size, _KEY)
        contenders = _filled(drive, setting, key=_KEY)
        for shape in _both(_SHAPES):
            theirs, ours = _measured(contenders, shape, setting, results, section)
            results.rows.append(iops_row(section, theirs, ours, _LEAST_ENCRYPTED))
        for shape in _both((_LARGE,)):
            before = _openssl_speed(setting.cores.server)
            theirs, ours = _measured(contenders, shape, setting, results, section)
            limit = median((before, _openssl_speed(setting.cores.server)))
            results.rows.append(iops_row(section, theirs, ours, None))
            results.rows += _a_core(section, theirs, ours, limit)


def _filled(
    drive: store_drive.StoreDrive, setting: Setting, key: str | None = None
) -> tuple[Gateway, Gateway]:
    for name in ("without", "with"):
        socket = drive.serve(name, setting.size, queues=_QUEUES, key=key)
        files.fill_volume(socket, setting.size, setting.cores)
    return (
        Gateway(drive.engine, "without", setting.cores, "without"),
        Gateway(drive.engine, "with", setting.cores, "with"),
    )


def _both(shapes: Sequence[Shape]) -> list[Shape]:
    return [shape for reads in shapes for shape in (reads, reads.writing().on_drive())]


def _measured(
    contenders: tuple[Gateway, Gateway], shape: Shape, setting: Setting, results: Results, section: str
) -> tuple[Rounds, Rounds]:
    without, sealed = contenders
    theirs, ours = compare([(without, shape), (sealed, shape)], setting.plan, setting.progress)
    results.keep(section, theirs, ours)
    return theirs, ours


def _a_core(section: str, theirs: Rounds, ours: Rounds, limit: float) -> list[Row]:
    """None where the stats page counted no request. `limit`: GiB/s of OpenSSL alone."""

    def speeds(rounds: Rounds) -> list[float]:
        busy = [one.reactor.busy_ns for one in rounds.measurements if one.reactor and one.reactor.busy_ns]
        return [rounds.shape.block_size / ns * 1e9 / (1 << 30) for ns in busy]

    own, bare = speeds(ours), speeds(theirs)
    if not own or not bare:
        return []
    said = f"OpenSSL alone {limit:.1f} GiB/s; without encryption {median(bare):.1f} GiB/s"
    what = f"{ours.shape}: data for each second that a reactor was busy"
    return [Row.absolute(section, what, "GiB/s", Spread.of(own), _LEAST_A_CORE, said)]


def _openssl_speed(core: int) -> float:
    """GiB/s of AES-256-XTS over blocks of 4 KiB."""
    command = ["taskset", "-c", str(core), "openssl", "speed", "-mr", "-seconds", "1", "-bytes", "4096"]
    done = subprocess.run([*command, "-evp", "aes-256-xts"], capture_output=True, text=True)
    found = re.search(r"^\+F:\d+:aes-256-xts:([0-9.]+)", done.stdout, re.MULTILINE | re.IGNORECASE)
    if done.returncode or found is None:
        raise FailedError(f"`openssl speed` said nothing to be read: {done.stderr.strip()[-200:]}")
    return float(found[1]) / (1 << 30)
