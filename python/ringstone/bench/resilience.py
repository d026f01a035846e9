"""The rows of `ringstone bench resilience`: crashes, upgrades, many cores, ring formats and hostile neighbours."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

from ringstone.bench import idle, neighbours, rings, scaling, stalls
from ringstone.bench.results import Results
from ringstone.bench.setting import Setting
from ringstone.errors import InvalidError, RingstoneError

COMMAND = "ringstone bench resilience"


class Part(StrEnum):
    """What can be run by itself, in the order of the table."""

    CRASH = "crash"
    UPGRADE = "upgrade"
    MOVE = "move"
    NEIGHBOURS = "neighbours"
    SCALING = "scaling"
    RINGS = "rings"
    LOG = "log"
    IDLE = "idle"
    EARLIER = "earlier"


_PARTS: dict[Part, Callable[[Setting, Results], None]] = {
    Part.CRASH: stalls.crash,
    Part.UPGRADE: stalls.upgrade,
    Part.MOVE: stalls.move,
    Part.NEIGHBOURS: neighbours.neighbours,
    Part.SCALING: scaling.scaling,
    Part.RINGS: rings.formats,
    Part.LOG: rings.dirty_log,
    Part.IDLE: idle.idle,
}


def chosen(only: Sequence[Part] | None, against: Path | None) -> list[Part]:
    """What to run: all, or what was asked for. The earlier release only where there is one; InvalidError when it is
    asked for without."""
    if only and Part.EARLIER in only and against is None:
        raise InvalidError("`--only earlier` needs --against with the directory of the earlier release.")
    every = [part for part in Part if part is not Part.EARLIER or against is not None]
    return [part for part in every if not only or part in only]


def run(parts: Sequence[Part], against: Path | None, setting: Setting, results: Results) -> None:
    """Adds the rows of `parts` to `results`. InvalidError before anything runs when `against` holds no Ringstone. One
    part of several that cannot be measured is noted, so that it does not cost the others their figures; a single one
    raises its RingstoneError."""
    if Part.EARLIER in parts and against is not None:
        rings.require_ringstone(against)
    for part in parts:
        try:
            _run(part, against, setting, results)
        except RingstoneError as error:
            if len(parts) == 1:
                raise
            results.notes.append(f"**Not measured to its end: {part}.** {error}")
            setting.progress(results.notes[-1])


def _run(part: Part, against: Path | None, setting: Setting, results: Results) -> None:
    if part is not Part.EARLIER:
        _PARTS[part](setting, results)
    elif against is not None:
        rings.previous(setting, results, against)
