"""Where volumes' blocks are kept on this host: one module per pool type."""

import os
import stat

from ringstone.errors import InvalidError
from ringstone.pools.base import (
    UNSEALED,
    Deletion,
    DrivePool,
    KeySource,
    LayerPool,
    Pool,
    Scrub,
    Sealed,
    SharedPool,
    Snapshot,
    SnapshotPool,
    Space,
    Usage,
)
from ringstone.pools.device import DevicePool
from ringstone.pools.faulty import FaultyPool
from ringstone.pools.file import FilePool
from ringstone.pools.memory import MemoryPool
from ringstone.pools.null import NullPool
from ringstone.state.records import PoolRecord

__all__ = [
    "PUBLIC_TYPES",
    "SHARED_TYPES",
    "TEST_TYPES",
    "UNSEALED",
    "Deletion",
    "DrivePool",
    "KeySource",
    "LayerPool",
    "Pool",
    "Scrub",
    "Sealed",
    "SharedPool",
    "Snapshot",
    "SnapshotPool",
    "Space",
    "Usage",
    "open_pool",
]

PUBLIC_TYPES = ("memory", "file", "store", "rbd", "null")
TEST_TYPES = ("faulty",)
# Types that every host reaches; a pool of any other belongs to one host.
SHARED_TYPES = ("rbd",)


def open_pool(record: PoolRecord) -> Pool:
    """The pool that `record` describes. Touches nothing but the type of its path; InvalidError for an unknown
    type."""
    # Types are imported here that not everybody has, so that nobody without such a pool waits for that.
    match record.type:
        case "memory":
            return MemoryPool(record)
        case "file":
            return DevicePool(record) if _is_block_device(record.path) else FilePool(record)
        case "store":
            from ringstone.pools.store import StorePool

            return StorePool(record)
        case "rbd":
            from ringstone.pools.rbd import RbdPool

            return RbdPool(record)
        case "null":
            return NullPool(record)
        case "faulty":
            return FaultyPool(record, open_pool)
    raise InvalidError(f"{record.type!r} is not a pool type; use {', '.join(PUBLIC_TYPES)}.")


def _is_block_device(path: str | None) -> bool:
    if path is None:
        return False
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        # Missing: the pool itself reports that, with its path, when it is used.
        return path.startswith("/dev/") and not path.startswith("/dev/shm/")
