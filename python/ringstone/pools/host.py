"""What the host's kernel says about filesystems and memory."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HugePages:
    """Of one size: `page_size` in bytes, `free` pages that nobody has reserved, `total` pages."""

    page_size: int
    free: int
    total: int


def filesystem_type(path: Path) -> str:
    """The type of the filesystem that holds `path` ("tmpfs", "hugetlbfs", "ext4"; "" when unknown). OSError
    if missing.

    Source: /proc/self/mountinfo, proc(5), matched by device number.
    """
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split()[0]
    return ""


def hugetlbfs_mounts() -> list[Path]:
    """Where hugetlbfs is mounted, in the order of the mounts."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] == "hugetlbfs":
            mounts.append(Path(left.split()[4]))
    return mounts


def huge_pages(page_size: int) -> HugePages:
    """The host's pages of `page_size` bytes. Source: /sys/kernel/mm/hugepages."""
    folder = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size // 1024}kB")

    def count(name: str) -> int:
        return int((folder / name).read_text())

    return HugePages(
        page_size, max(count("free_hugepages") - count("resv_hugepages"), 0), count("nr_hugepages")
    )


def available_memory() -> int:
    """Bytes that can be taken without swapping: MemAvailable of /proc/meminfo, proc(5)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return 0
