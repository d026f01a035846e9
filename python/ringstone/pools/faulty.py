"""The faulty pool: a memory or file pool whose volumes fail, wait, tear or lose writes. For tests, never for
data."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ringstone.errors import InvalidError
from ringstone.pools.base import Pool, Usage
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord

FAULTS = ("seed", "error_per_million", "delay_us", "torn_per_million", "lost_per_million")


class FaultyPool:
    """Implements ringstone.pools.Pool. Options: `inner`, the type of the pool within, and the engine's
    FAULTS."""

    def __init__(self, record: PoolRecord, open_inner: Callable[[PoolRecord], Pool]) -> None:
        inner = record.options.get("inner", "memory")
        if inner not in ("memory", "file"):
            raise InvalidError(f"{inner!r} cannot be made faulty; use memory or file as `inner`.")
        self.record = record
        self._inner = open_inner(replace(record, type=str(inner)))

    def prepare(self, *, erase: bool = False) -> None:
        self._inner.prepare(erase=erase)

    def discard(self) -> None:
        self._inner.discard()

    def identity(self) -> str | None:
        return self._inner.identity()

    def check(self) -> None:
        self._inner.check()

    def usage(self) -> Usage:
        return self._inner.usage()

    def default_size(self) -> int | None:
        return self._inner.default_size()

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        self._inner.admit(extra, volumes, new=new)

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        self._inner.refuse_foreign(volume)

    def create_backing(self, volume: VolumeRecord) -> None:
        self._inner.create_backing(volume)

    def remove_backing(self, volume: VolumeRecord) -> None:
        self._inner.remove_backing(volume)

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        self._inner.resize_backing(volume, size)

    def check_backing(self, volume: VolumeRecord) -> None:
        self._inner.check_backing(volume)

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        return self._inner.restore_backing(volume, new_boot=new_boot)

    def allocated(self, volume: VolumeRecord) -> int | None:
        return self._inner.allocated(volume)

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        faults = {name: self.record.options.get(name, 0) for name in FAULTS}
        return {"type": "faulty", "inner": self._inner.backend(volume), **faults}
