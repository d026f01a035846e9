"""The null pool: volumes that keep nothing. For measuring everything but the medium."""

from collections.abc import Sequence

from ringstone.pools.base import Usage, admit_to_capacity
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord


class NullPool:
    """Implements ringstone.pools.Pool."""

    def __init__(self, record: PoolRecord) -> None:
        self.record = record

    def prepare(self, *, erase: bool = False) -> None:
        return

    def discard(self) -> None:
        return

    def identity(self) -> str | None:
        return None

    def check(self) -> None:
        return

    def usage(self) -> Usage:
        return Usage(None, None)

    def default_size(self) -> int | None:
        return None

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        admit_to_capacity(self.record, extra, volumes)

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        return

    def create_backing(self, volume: VolumeRecord) -> None:
        return

    def remove_backing(self, volume: VolumeRecord) -> None:
        return

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        return

    def check_backing(self, volume: VolumeRecord) -> None:
        return

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        return None

    def allocated(self, volume: VolumeRecord) -> int | None:
        return 0

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        return {"type": "null"}
