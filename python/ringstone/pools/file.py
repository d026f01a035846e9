"""The file pool: thin files in a directory. Blocks are taken from its filesystem as they are written."""

import os
from collections.abc import Sequence
from pathlib import Path

from ringstone.errors import InvalidError, NoSpaceError, error_of_os
from ringstone.pools.base import Usage, admit_to_capacity
from ringstone.pools.directory import Directory
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord
from ringstone.units import format_size


class FilePool:
    """Implements ringstone.pools.Pool. Option `direct`: "auto" (O_DIRECT where the filesystem can), "on" or
    "off"."""

    def __init__(self, record: PoolRecord) -> None:
        if record.path is None or not os.path.isabs(record.path):
            raise InvalidError(
                f"File pool {record.name!r} needs the absolute path of a directory or block device."
            )
        self.record = record
        self._directory = Directory(Path(record.path), reserve=False)

    def prepare(self, *, erase: bool = False) -> None:
        if self.record.options.get("managed"):
            self._directory.make()
        self.check()

    def discard(self) -> None:
        if self.record.options.get("managed"):
            self._directory.remove_if_empty()

    def identity(self) -> str | None:
        return self._directory.identity()

    def check(self) -> None:
        self._directory.check(self.record)

    def usage(self) -> Usage:
        try:
            found = os.statvfs(self._directory.path)
        except OSError as error:
            raise error_of_os(
                error, f"asking the size of {self._directory.path}", "Check its mount."
            ) from error
        return Usage(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def default_size(self) -> int | None:
        return None

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        admit_to_capacity(self.record, extra, volumes)
        free = self.usage().free or 0
        if extra > free:
            raise NoSpaceError(
                f"The filesystem under {self._directory.path} has {format_size(free)} free, and "
                f"{format_size(extra)} "
                "more were asked for. Choose a smaller size, free some space or use another pool."
            )

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        self._directory.refuse_foreign(volume)

    def create_backing(self, volume: VolumeRecord) -> None:
        self._directory.create(volume, volume.size)

    def remove_backing(self, volume: VolumeRecord) -> None:
        self._directory.remove(volume)

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        self._directory.resize(volume, size)

    def check_backing(self, volume: VolumeRecord) -> None:
        self._directory.check_file(volume)

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        self.check_backing(volume)
        return None

    def allocated(self, volume: VolumeRecord) -> int | None:
        return self._directory.allocated(volume)

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        return {
            "type": "file",
            "path": str(self._directory.file(volume)),
            "direct": self.record.options.get("direct", "auto"),
        }
