"""The door to the engine's stores: their calls with Python's types and the project's errors."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ringstone import _engine
from ringstone.errors import error_of_code
from ringstone.pools.base import Deletion, Scrub, Snapshot


@dataclass(frozen=True, slots=True)
class StoredVolume:
    """`own`: bytes written since the latest snapshot; `inherited`: those that it reads from layers before. `origin`:
    volume and snapshot that it was cloned from and reads from still. `open`: the engine serves it. `integrity`:
    its blocks have checksums; `encryption`: they are encrypted."""

    name: str
    size: int
    created_s: int
    own: int
    inherited: int
    origin: tuple[str, str] | None
    open: bool
    integrity: bool
    encryption: bool
    snapshots: tuple[Snapshot, ...]
    deleting: tuple[Deletion, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """Bytes: as ringstone.pools.base.Space."""

    size: int
    capacity: int
    used: int
    promised: int
    reclaiming: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of 4096 bytes: `read`, and of these `verified` against their checksums; `bad`: not what was written;
    `unreadable`: refused by the drive."""

    read: int
    verified: int
    bad: int
    unreadable: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a check has found. `faults` are what cannot be, `notes` what a reader should know and is in order,
    `mendable` what repair() writes anew; `blocks` is None where they were left out."""

    uuid: str
    size: int
    extent: int
    capacity: int
    used: int
    volumes: tuple[StoredVolume, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    mendable: tuple[str, ...]
    blocks: Blocks | None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _engine.EngineError as error:
        message = str(error).removesuffix(".")
        raise error_of_code(error.code, f"{message[:1].upper()}{message[1:]}.") from error


def format_store(path: str, *, size: int | None, extent: int) -> str:
    """Make a store of all that is at `path`, or of a new file of `size` bytes; the uuid that it got."""
    with _translated():
        return _engine.Store.format(path, size=size, extent=extent)


def look(path: str) -> str | None:
    """The uuid of the store at `path`, whoever has it open; None where there is none."""
    with _translated():
        return _engine.Store.look(path)


def check(path: str, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """Walk through all of a store that nobody has open; nothing is changed. With `progress`, which hears of the bytes
    read and of all, the blocks in use are read too."""
    with _translated():
        return _report(_engine.Store.check(path, progress=progress))


def repair(path: str) -> Report:
    """Write anew what check() calls mendable; what was found before. FailedError when there are faults beside that,
    and nothing is written then."""
    with _translated():
        return _report(_engine.Store.repair(path))


def _report(text: str) -> Report:
    found = json.loads(text)
    blocks = found["blocks"]
    return Report(
        found["uuid"],
        found["size"],
        found["extent"],
        found["capacity"],
        found["used"],
        _volumes(found["volumes"]),
        tuple(found["faults"]),
        tuple(found["notes"]),
        tuple(found["mendable"]),
        None if blocks is None else Blocks(**blocks),
    )


class OpenStore:
    """A store that this process has open, from the first of these for its path until close()."""

    def __init__(self, path: str) -> None:
        """BusyError when another process has it, FailedError when it is damaged."""
        with _translated():
            self._store = _engine.Store(path)

    def close(self) -> None:
        """BusyError while a volume of it is open."""
        with _translated():
            self._store.close()

    def create(self, name: str, size: int, *, integrity: bool = False) -> None:
        self._call("create", name=name, size=size, integrity=integrity)

    def create_encrypted(self, name: str, size: int, *, integrity: bool, key: bytes) -> None:
        """`key`: the pool's, which wraps the volume's own."""
        with _translated():
            self._store.create_encrypted(name, size, integrity, key)

    def wrap_anew(self, before: Sequence[bytes], key: bytes) -> int:
        """Have `key` wrap what keys `before` have wrapped: how many volumes' keys that were."""
        with _translated():
            return self._store.wrap_anew(list(before), key)

    def delete(self, name: str) -> None:
        self._call("delete", name=name)

    def resize(self, name: str, size: int) -> None:
        self._call("resize", name=name, size=size)

    def snapshot(self, volumes: Sequence[str], name: str) -> None:
        self._call("snapshot", volumes=list(volumes), name=name)

    def delete_snapshot(self, volume: str, name: str) -> None:
        self._call("delete_snapshot", volume=volume, name=name)

    def keep_snapshot(self, volume: str, name: str) -> None:
        self._call("keep_snapshot", volume=volume, name=name)

    def reclaimable(self, volume: str) -> dict[str, int | None]:
        return dict(self._call("reclaimable", volume=volume)["snapshots"])

    def revert(self, volume: str, name: str) -> None:
        self._call("revert", volume=volume, name=name)

    def clone(self, volume: str, snapshot: str | None, name: str) -> None:
        self._call("clone", volume=volume, snapshot=snapshot, name=name)

    def flatten(self, volume: str) -> None:
        self._call("flatten", volume=volume)

    def volumes(self) -> tuple[StoredVolume, ...]:
        return _volumes(self._call("list", name=None)["volumes"])

    def volume(self, name: str) -> StoredVolume | None:
        """None where there is none. It costs no more in a store with many volumes."""
        return next(iter(_volumes(self._call("list", name=name)["volumes"])), None)

    def figures(self) -> Figures:
        found = self._call("figures")
        return Figures(
            found["size"], found["capacity"], found["used"], found["promised"], found["reclaiming"]
        )

    def diff(self, volume: str, since: str | None, until: str | None) -> list[tuple[int, int]]:
        found = self._call("diff", volume=volume, **{"from": since, "to": until})
        return [(offset, length) for offset, length in found["ranges"]]

    def grow(self) -> None:
        """Use the drive as long as it is now."""
        self._call("grow")

    def begin_scrub(self, rate: int) -> None:
        self._call("scrub", rate=rate)

    def cancel_scrub(self) -> None:
        self._call("cancel_scrub")

    def scrub(self) -> Scrub | None:
        found = self._call("scrub_status")["scrub"]
        return None if found is None else Scrub(**{**found, "faults": tuple(found["faults"])})

    def _call(self, op: str, **values: Any) -> dict[str, Any]:
        with _translated():
            answer = self._store.call(json.dumps({"op": op, **values}))
        found: dict[str, Any] = json.loads(answer)
        return found


def _volumes(found: list[dict[str, Any]]) -> tuple[StoredVolume, ...]:
    return tuple(
        StoredVolume(
            one["name"],
            one["size"],
            one["created_s"],
            one["own"],
            one["inherited"],
            tuple(one["origin"]) if one["origin"] else None,
            one["open"],
            one["integrity"],
            one["encryption"],
            tuple(
                Snapshot(snapshot["name"], snapshot["size"], snapshot["created_s"], snapshot["own"])
                for snapshot in one["snapshots"]
            ),
            tuple(Deletion(gone["name"], gone["total"], gone["left"]) for gone in one["deleting"]),
        )
        for one in found
    )
