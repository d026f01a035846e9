"""2 MiB pages for the length of a measurement."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE_BYTES = 2 << 20
POOL = Path("/proc/sys/vm/nr_hugepages")
_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def pages_for(*sizes: int) -> int:
    """Pages that hold memories of these sizes, each on pages of its own."""
    return sum(-(-size // PAGE_BYTES) for size in sizes)


def free_pages(path: Path = _FREE) -> int:
    """Free 2 MiB pages; 0 on a kernel without them."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


@contextmanager
def reserved(pages: int, *, pool: Path = POOL, free: Path = _FREE) -> Iterator[int]:
    """Have `pages` free 2 MiB pages where root can have them, and take them back at the end.

    Yields how many are free, which may be fewer: memory may be too fragmented, or this may not be root.
    """
    lacking = pages - free_pages(free)
    if lacking <= 0 or not os.access(pool, os.W_OK):
        yield free_pages(free)
        return
    former = int(pool.read_text())
    pool.write_text(str(former + lacking))
    added = int(pool.read_text()) - former
    try:
        yield free_pages(free)
    finally:
        # Somebody else may have changed the pool meanwhile: give back what was taken, not the former figure.
        pool.write_text(str(max(int(pool.read_text()) - added, 0)))
