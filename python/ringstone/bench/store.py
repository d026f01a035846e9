"""The rows of `ringstone bench store`: volumes of a store beside a file of the same drive and beside qcow2."""

from collections.abc import Callable, Sequence
from enum import StrEnum

from ringstone.bench import store_chain, store_pauses, store_sealed, store_size, store_steady, store_writes
from ringstone.bench.compare import Plan
from ringstone.bench.results import Results
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Window
from ringstone.errors import RingstoneError

COMMAND = "ringstone bench store"
_NOTES = ("The drive is a file on a file system. Its noise is in all figures, of the contenders in turn.",)
QUICK_PLAN = Plan(2, Window(0.3, 0.1), Window(0.2, 0.05))
QUICK_BYTES = 256 << 20


class Part(StrEnum):
    """What can be run by itself, in the order of the table."""

    STEADY = "steady"
    AFTER_SNAPSHOT = "after-snapshot"
    FILLING = "filling"
    CHAIN = "chain"
    SNAPSHOTS = "snapshots"
    DELETION = "deletion"
    SIZE = "size"
    INTEGRITY = "integrity"
    ENCRYPTION = "encryption"


_PARTS: dict[Part, Callable[[Setting, Results], None]] = {
    Part.STEADY: store_steady.steady,
    Part.AFTER_SNAPSHOT: store_writes.after_snapshot,
    Part.FILLING: store_writes.filling,
    Part.CHAIN: store_chain.chain,
    Part.SNAPSHOTS: store_pauses.snapshots,
    Part.DELETION: store_pauses.deletion,
    Part.SIZE: store_size.size,
    Part.INTEGRITY: store_sealed.integrity,
    Part.ENCRYPTION: store_sealed.encryption,
}


def run(parts: Sequence[Part], setting: Setting, results: Results) -> None:
    """Adds the rows of `parts` to `results`. One part of several that cannot be measured is noted, so that it does not
    cost the others their figures; a single one raises its RingstoneError."""
    results.notes += _NOTES
    for part in parts:
        try:
            _PARTS[part](setting, results)
        except RingstoneError as error:
            if len(parts) == 1:
                raise
            results.notes.append(f"**Not measured to its end: {part}.** {error}")
            setting.progress(results.notes[-1])
