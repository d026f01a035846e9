"""Reads and overwrites of a volume with checksums beside one without, of the same store."""

from ringstone.bench import files, store_drive
from ringstone.bench.compare import compare, limited_by
from ringstone.bench.gateway import Gateway
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Shape
from ringstone.bench.spread import Bar

_SHAPES = (Shape(depth=1), Shape(depth=32), Shape(depth=32, queues=4))
_QUEUES = 4
_LEAST = Bar("at least 0.8 of without, at depth 32", at_least=0.8)


def integrity(setting: Setting, results: Results) -> None:
    """Both are served by one engine and written all over before."""
    section = f"checksums, {setting.size >> 20} MiB, beside a volume without"
    with store_drive.opened(setting, 2 * setting.size) as drive:
        contenders = []
        for name, kept in (("without", False), ("with", True)):
            drive.command("create", name=name, size=setting.size, integrity=kept)
            files.fill_volume(drive.serve(name, setting.size, queues=_QUEUES), setting.size, setting.cores)
            contenders.append(Gateway(drive.engine, name, setting.cores, name))
        without, kept_ones = contenders
        for reads in _SHAPES:
            for shape in (reads, reads.writing().on_drive()):
                theirs, ours = compare([(without, shape), (kept_ones, shape)], setting.plan, setting.progress)
                results.keep(section, theirs, ours)
                results.rows.append(
                    Row.beside(
                        section,
                        f"{ours.shape}: IOPS",
                        "IOPS",
                        [one.iops for one in ours.measurements],
                        (theirs.name, [one.iops for one in theirs.measurements]),
                        limited_by(ours, device=True),
                        _LEAST if shape.depth > 1 else None,
                    )
                )
