"""What packed rings, the in-flight region and the dirty log cost, and this engine beside an earlier release.

All contenders of one row use the same client; what differs is said to the backend when it connects.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ringstone.bench import compare as figures
from ringstone.bench import files, hugepages
from ringstone.bench.compare import Rounds, compare, limited_by
from ringstone.bench.gateway import EngineProcess, Gateway
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Measurement, Shape
from ringstone.bench.spread import Bar
from ringstone.errors import InvalidError

_VOLUMES = {"memory": {"type": "memory", "path": None}, "null": {"type": "null"}}
_SHAPES = tuple(
    shape
    for depth in (1, 32)
    for shape in (Shape(depth=depth, inflight=False), Shape(depth=depth, inflight=False).writing())
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A contender's name, the engine that serves it, and what becomes of the shape."""

    name: str
    engine: EngineProcess
    of: Callable[[Shape], Shape]


def plain(shape: Shape) -> Shape:
    return shape


def tracked(shape: Shape) -> Shape:
    return replace(shape, inflight=True)


def packed(shape: Shape) -> Shape:
    return replace(shape, packed=True)


def logged(shape: Shape) -> Shape:
    return replace(shape, dirty_log=True)


def formats(setting: Setting, results: Results, shapes: Sequence[Shape] = _SHAPES) -> None:
    """Split and packed rings, each with and without an in-flight region."""
    section = "packed rings beside split ones, and the in-flight region"
    with ExitStack() as stack:
        engine = _serve(setting, results, stack, "formats", None)
        variants = (
            Variant("split", engine, plain),
            Variant("split, in-flight region", engine, tracked),
            Variant("packed", engine, packed),
            Variant("packed, in-flight region", engine, lambda shape: packed(tracked(shape))),
        )
        pairs = ((1, 0), (2, 0), (3, 1))
        for volume in _VOLUMES:
            for shape in shapes:
                _compare(
                    section,
                    volume,
                    shape,
                    variants,
                    pairs,
                    Bar("at least 0.9", at_least=0.9),
                    setting,
                    results,
                )


def dirty_log(setting: Setting, results: Results) -> None:
    """Reads with and without a dirty log, as before and during a live migration."""
    section = "the dirty log of a live migration"
    with ExitStack() as stack:
        engine = _serve(setting, results, stack, "log", None)
        variants = (Variant("no log", engine, plain), Variant("dirty log", engine, logged))
        for shape in _SHAPES:
            if shape.read_share < 100:
                continue
            _compare(section, "memory", shape, variants, ((1, 0),), None, setting, results)


def previous(setting: Setting, results: Results, path: Path, shapes: Sequence[Shape] = _SHAPES) -> None:
    """This engine beside another build of Ringstone; `path` is what `pip install --target` made."""
    require_ringstone(path)
    section = "this release beside an earlier one"
    results.notes.append(f"The earlier release is {path.absolute().name}.")
    with ExitStack() as stack:
        before = _serve(setting, results, stack, "earlier", path)
        now = _serve(setting, results, stack, "now", None)
        variants = (
            Variant("earlier release", before, plain),
            Variant("this release", now, plain),
            Variant("this release, in-flight region", now, tracked),
        )
        for shape in shapes:
            bar = Bar("at least 0.95", at_least=0.95)
            _compare(section, "memory", shape, variants, ((1, 0), (2, 0)), bar, setting, results)


def require_ringstone(path: Path) -> None:
    """InvalidError unless Python finds a Ringstone in `path` before any other."""
    done = subprocess.run(
        [sys.executable, "-c", "import ringstone._engine as engine; print(engine.__file__)"],
        env=os.environ | {"PYTHONPATH": str(path.absolute())},
        capture_output=True,
        text=True,
        check=False,
    )
    found = Path(done.stdout.strip())
    if done.returncode or path.absolute() not in found.parents:
        raise InvalidError(
            f"There is no Ringstone in {path}. Make one with `pip install --target {path} SOURCE` and give that "
            "directory."
        )


def _serve(
    setting: Setting, results: Results, stack: ExitStack, name: str, python_path: Path | None
) -> EngineProcess:
    """An engine on one core with a memory volume that is full and a null volume."""
    stack.enter_context(setting.ahead())
    pages = hugepages.pages_for(setting.size) + 8
    if stack.enter_context(hugepages.reserved(pages)) < pages:
        results.notes.append(f"Hugepages: {pages} could not be had for {name}; the rest is on 4 KiB pages.")
    directory = setting.directory / name
    directory.mkdir()
    absolute = python_path.absolute() if python_path is not None else None
    engine = stack.enter_context(EngineProcess(directory, [setting.cores.server], python_path=absolute))
    for volume, backend in _VOLUMES.items():
        engine.serve(volume, json.dumps(backend), size=setting.size)
    files.fill_volume(engine.socket_of("memory"), setting.size, setting.cores)
    return engine


def _compare(
    section: str,
    volume: str,
    shape: Shape,
    variants: Sequence[Variant],
    pairs: Sequence[tuple[int, int]],
    bar: Bar | None,
    setting: Setting,
    results: Results,
) -> None:
    """A row for each pair (subject, reference) of `variants`; all of them run in turn."""
    contenders = [
        (Gateway(variant.engine, volume, setting.cores, variant.name), variant.of(shape))
        for variant in variants
    ]
    taken = compare(contenders, setting.plan, setting.progress)
    results.keep(f"{section}: {volume}", *taken)
    for subject, reference in pairs:
        results.rows.append(_row(section, f"{volume}, {shape}", taken[subject], taken[reference], bar))


def _row(section: str, what: str, ours: Rounds, reference: Rounds, bar: Bar | None) -> Row:
    def values(rounds: Rounds, figure: Callable[[Measurement], float]) -> list[float]:
        return [figure(one) for one in rounds.measurements]

    means = [rounds.spread(figures.mean_ns).median for rounds in (reference, ours)]
    return Row.beside(
        section,
        f"{what}: {ours.name}",
        "IOPS",
        values(ours, figures.iops),
        (reference.name, values(reference, figures.iops)),
        f"{cost_change(reference, ours)}; mean {means[0]:,.0f} ns to {means[1]:,.0f} ns; {limited_by(ours)}",
        bar,
    )


def cost_change(reference: Rounds, ours: Rounds) -> str:
    """Reactor time for a request of both, in words."""
    before, after = reference.middle(figures.reactor_busy_ns), ours.middle(figures.reactor_busy_ns)
    if before is None or after is None:
        return "reactor time unknown"
    return f"reactor busy {before:.0f} ns to {after:.0f} ns per request"
