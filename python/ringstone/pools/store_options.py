"""What may be chosen of a store pool."""

from dataclasses import dataclass
from typing import TypeGuard

from ringstone.errors import InvalidError
from ringstone.pools import keys
from ringstone.pools.base import KeySource
from ringstone.state.records import PoolRecord

DEFAULT_EXTENT = 64 << 10
SMALLEST_EXTENT, LARGEST_EXTENT = 16 << 10, 1 << 20
DEFAULT_OVERCOMMIT = 10.0
LARGEST_OVERCOMMIT = 1000.0

# Said when the pool is made, and of no meaning afterwards.
WHILE_MADE = ("size", "replaces")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """`extent`: bytes of the unit in which blocks have a place. `overcommit`: how many times the capacity the volumes'
    sizes may add up to. `size`: of a file that is made with the pool. `key`: where the key is that wraps the keys of
    encrypted volumes; None where there can be none."""

    extent: int
    overcommit: float
    size: int | None
    key: KeySource | None


def of(record: PoolRecord) -> StoreOptions:
    """InvalidError names the option that cannot be."""
    extent = record.options.get("extent", DEFAULT_EXTENT)
    if not _is_whole(extent) or extent.bit_count() != 1 or not SMALLEST_EXTENT <= extent <= LARGEST_EXTENT:
        raise InvalidError(f"{extent!r} is no extent; use 16K, 32K, 64K, 128K, 256K, 512K or 1M.")
    overcommit = record.options.get("overcommit", DEFAULT_OVERCOMMIT)
    if isinstance(overcommit, bool) or not isinstance(overcommit, int | float):
        raise InvalidError(f"The overcommit {overcommit!r} is no number.")
    if not 1 <= overcommit <= LARGEST_OVERCOMMIT:
        raise InvalidError(
            f"The overcommit {overcommit:g} is not within 1 (volumes are together no larger than the drive) and "
            f"{LARGEST_OVERCOMMIT:g}."
        )
    size = record.options.get("size")
    if size is not None and not _is_whole(size):
        raise InvalidError(f"{size!r} is no size in bytes.")
    return StoreOptions(extent, float(overcommit), size, keys.of(record.options))


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
