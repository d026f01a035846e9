"""The memory pool: files on tmpfs or hugetlbfs. Content outlives the gateway but not the host."""

import os
from collections.abc import Sequence
from pathlib import Path

from ringstone.errors import FailedError, InvalidError, NoDeviceError, NoSpaceError, error_of_os
from ringstone.pools.base import Usage, admit_to_capacity
from ringstone.pools.directory import Directory
from ringstone.pools.host import available_memory, filesystem_type, huge_pages, hugetlbfs_mounts
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord
from ringstone.units import format_size

_TMPFS = Path("/dev/shm")


def default_path(name: str, *, huge: bool) -> str:
    """Where pool `name` keeps its files when no path is given; NoDeviceError without a hugetlbfs mount."""
    if not huge:
        return str(_TMPFS / f"ringstone-{name}")
    mounts = hugetlbfs_mounts()
    if not mounts:
        raise NoDeviceError(
            "No hugetlbfs is mounted on this host. Run `mount -t hugetlbfs none /dev/hugepages`, reserve "
            "pages with "
            "`sysctl vm.nr_hugepages`, or leave hugepages out."
        )
    return str(mounts[0] / f"ringstone-{name}")


class MemoryPool:
    """Implements ringstone.pools.Pool. The whole of a volume is taken from the host's memory when it is
    made."""

    def __init__(self, record: PoolRecord) -> None:
        if record.path is None or not os.path.isabs(record.path):
            raise InvalidError(
                f"Memory pool {record.name!r} needs the absolute path of a directory in memory."
            )
        self.record = record
        self._directory = Directory(Path(record.path), reserve=True)

    def prepare(self, *, erase: bool = False) -> None:
        if self.record.options.get("managed"):
            self._directory.make()
        try:
            self.check()
        except Exception:
            self.discard()
            raise

    def discard(self) -> None:
        if self.record.options.get("managed"):
            self._directory.remove_if_empty()

    def identity(self) -> str | None:
        return self._directory.identity()

    def check(self) -> None:
        self._directory.check(self.record)
        kind = self._filesystem()
        if kind not in ("tmpfs", "hugetlbfs"):
            raise InvalidError(
                f"{self._directory.path} is on {kind or 'an unknown filesystem'}, not in memory. "
                "Choose a directory on tmpfs or hugetlbfs, or make a file pool."
            )

    def _filesystem(self) -> str:
        try:
            return filesystem_type(self._directory.path)
        except OSError as error:
            raise error_of_os(error, f"looking at {self._directory.path}", "Check its mount.") from error

    def _page_size(self) -> int:
        """The unit in which backings grow: hugetlbfs files have whole pages only."""
        if self._filesystem() != "hugetlbfs":
            return 4096
        try:
            return os.statvfs(self._directory.path).f_bsize
        except OSError as error:
            raise error_of_os(error, f"looking at {self._directory.path}", "Check its mount.") from error

    def usage(self) -> Usage:
        try:
            found = os.statvfs(self._directory.path)
            if self._filesystem() == "hugetlbfs":
                pages = huge_pages(found.f_bsize)
                return Usage(pages.total * pages.page_size, pages.free * pages.page_size)
            total = found.f_blocks * found.f_frsize
            free = found.f_bavail * found.f_frsize
        except OSError as error:
            raise error_of_os(
                error, f"asking the size of {self._directory.path}", "Check its mount."
            ) from error
        # A tmpfs mounted with size=0 has no limit of its own and reports zero blocks: tmpfs(5).
        available = available_memory()
        return Usage(total or None, min(free, available) if total else available)

    def default_size(self) -> int | None:
        return None

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        admit_to_capacity(self.record, extra, volumes)
        free = self.usage().free or 0
        if self._length(extra) > free:
            raise NoSpaceError(
                f"The host has {format_size(free)} of memory free for {self._directory.path}, and "
                f"{format_size(extra)} "
                "more were asked for. Choose a smaller size, free memory or use another pool."
            )

    def _length(self, size: int) -> int:
        page = self._page_size()
        return (size + page - 1) // page * page

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        self._directory.refuse_foreign(volume)

    def create_backing(self, volume: VolumeRecord) -> None:
        self._directory.create(volume, self._length(volume.size))

    def remove_backing(self, volume: VolumeRecord) -> None:
        self._directory.remove(volume)

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        self._directory.resize(volume, self._length(size))

    def check_backing(self, volume: VolumeRecord) -> None:
        self._directory.check_file(volume)

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        if self._directory.file(volume).exists():
            self.check_backing(volume)
            return None
        if not new_boot:
            # A guest may be running on it still, and must not be told zeroes.
            raise FailedError(
                f"The file {self._directory.file(volume)} of volume {volume.name!r} is gone, though the host has not "
                "booted since: somebody has removed it or unmounted its directory. Mount that again. If the file was "
                f"removed its content is lost: `ringstone volume detach {volume.name}`, delete it and make it anew."
            )
        try:
            # Even one that was not made with the pool: the directory is gone with the content.
            self._directory.make()
            self.check()
            self.create_backing(volume)
        except (NoDeviceError, InvalidError, NoSpaceError) as error:
            raise FailedError(
                f"The backing of volume {volume.name!r} cannot be made anew. {error}"
            ) from error
        return (
            f"The content of volume {volume.name!r} is gone, as memory does not outlive the host; "
            "it was made anew and reads as zeroes."
        )

    def allocated(self, volume: VolumeRecord) -> int | None:
        return self._directory.allocated(volume)

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        return {"type": "memory", "path": str(self._directory.file(volume)), "hugepages": "auto"}
