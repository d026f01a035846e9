"""A stand-in for the engine's class Store, which keeps no blocks: names, sizes and what refuses what."""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ringstone import _engine

# As in docs/formats/store.md: the first bytes of both superblocks say that there is a store.
_MARK = b"RSTORE--"
_PLACES = (0, 512 << 10)
MIB = 1 << 20


def failure(code: str, message: str) -> _engine.EngineError:
    error = _engine.EngineError(message)
    error.code = code
    return error


@dataclass
class _Volume:
    size: int
    origin: tuple[str, str] | None = None
    own: int = 0
    open: bool = False
    integrity: bool = False
    key: bytes | None = None
    snapshots: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, int] = field(default_factory=dict)


@dataclass
class _Content:
    uuid: str
    length: int
    extent: int
    scrub: dict[str, Any] | None = None
    bad_copies: list[str] = field(default_factory=list)
    volumes: dict[str, _Volume] = field(default_factory=dict)


class FakeStore:
    """In place of ringstone._engine.Store. Each of its stores is in `drives`, by uuid; `opened` are the paths that this
    process has; `elsewhere` those that another one has; `commands` what was asked."""

    drives: ClassVar[dict[str, _Content]] = {}
    opened: ClassVar[set[str]] = set()
    elsewhere: ClassVar[set[str]] = set()
    commands: ClassVar[list[dict[str, Any]]] = []
    failures: ClassVar[dict[str, _engine.EngineError]] = {}

    def __init__(self, path: str) -> None:
        if path in self.elsewhere:
            raise failure("in_use", f"another process has the store {path} open")
        self._path = path
        found = self.look(path)
        if found is None:
            raise failure("invalid", f"there is no store at {path}")
        self._content = self.drives[found]
        self.opened.add(path)

    @classmethod
    def format(cls, path: str, *, size: int | None = None, extent: int = 65536) -> str:
        if "format" in cls.failures:
            raise cls.failures.pop("format")
        if size is not None:
            with open(path, "xb") as made:
                made.truncate(size)
        name = uuid.uuid4().hex
        with open(path, "r+b") as drive:
            for place in _PLACES:
                drive.seek(place)
                drive.write(_MARK + bytes.fromhex(name))
            length = drive.seek(0, os.SEEK_END)
        cls.drives[name] = _Content(name, length, extent)
        return name

    @staticmethod
    def look(path: str) -> str | None:
        with open(path, "rb") as drive:
            begin = drive.read(24)
        return begin[8:].hex() if begin.startswith(_MARK) else None

    @classmethod
    def check(cls, path: str, *, progress: Callable[[int, int], None] | None = None) -> str:
        if path in cls.opened | cls.elsewhere:
            raise failure("in_use", f"another process has the store {path} open")
        found = cls.look(path)
        if found is None:
            raise failure("invalid", f"there is no store at {path}")
        content = cls.drives[found]
        if progress is not None:
            progress(MIB, MIB)
        report = {
            "uuid": found,
            "size": content.length,
            "extent": content.extent,
            "capacity": content.length // 2,
            "used": sum(volume.own for volume in content.volumes.values()),
            "volumes": _list(content),
            "faults": ["slot 7 has no owner"] if "check" in cls.failures else [],
            "notes": ["3 blocks of the journal were not durable and are dropped"],
            "mendable": content.bad_copies,
            "blocks": None if progress is None else {"read": 256, "verified": 64, "bad": 0, "unreadable": 0},
        }
        return json.dumps(report)

    @classmethod
    def repair(cls, path: str) -> str:
        report = cls.check(path)
        if json.loads(report)["faults"]:
            raise failure("io", f"the store {path} has 1 faults that cannot be mended")
        cls.drives[json.loads(report)["uuid"]].bad_copies = []
        return report

    def close(self) -> None:
        if any(volume.open for volume in self._content.volumes.values()):
            raise failure("busy", "a volume of the store is open")
        self.opened.discard(self._path)

    def call(self, command: str) -> str:
        given = json.loads(command)
        self.commands.append(given)
        op = given.pop("op")
        if op in self.failures:
            raise self.failures.pop(op)
        answer = getattr(self, f"_{op}")(**{f"{name}_": value for name, value in given.items()})
        return json.dumps(answer or {})

    def written(self, volume: str, own: int) -> None:
        """As if a guest had filled that many bytes."""
        self._content.volumes[volume].own = own

    def hold(self, volume: str, *, open: bool) -> None:
        self._content.volumes[volume].open = open

    def goes_on(self, **values: Any) -> None:
        """As if the scrub had come so far."""
        assert self._content.scrub is not None
        self._content.scrub.update(values)

    def _volume(self, name: str) -> _Volume:
        if name not in self._content.volumes:
            raise failure("not_found", f'the store has no volume "{name}"')
        return self._content.volumes[name]

    def _closed(self, name: str) -> _Volume:
        found = self._volume(name)
        if found.open:
            raise failure("busy", f'volume "{name}" is in use; detach it first')
        return found

    def _new(self, name: str, volume: _Volume) -> None:
        if name in self._content.volumes:
            raise failure("exists", f'the store has a volume "{name}" already')
        self._content.volumes[name] = volume

    def _clones(self, volume: str, snapshot: str) -> list[str]:
        volumes = self._content.volumes.items()
        return [name for name, one in volumes if one.origin == (volume, snapshot)]

    def _create(self, name_: str, size_: int, integrity_: bool = False) -> None:
        self._new(name_, _Volume(size_, integrity=integrity_))

    def create_encrypted(self, name: str, size: int, integrity: bool, key: bytes) -> None:
        self._new(name, _Volume(size, integrity=integrity, key=key))

    def wrap_anew(self, before: list[bytes], key: bytes) -> int:
        other = [one for one in self._content.volumes.values() if one.key not in (None, key)]
        if any(one.key not in before for one in other):
            raise failure("denied", "its key was wrapped by another key than the pool has")
        for one in other:
            one.key = key
        return len(other)

    def _delete(self, name_: str) -> None:
        if self._closed(name_).snapshots:
            raise failure("busy", f'volume "{name_}" has snapshots. Delete them first')
        del self._content.volumes[name_]

    def _resize(self, name_: str, size_: int) -> None:
        found = self._volume(name_)
        if size_ < found.size:
            raise failure("invalid", "a volume cannot shrink")
        found.size = size_

    def _snapshot(self, volumes_: list[str], name_: str) -> None:
        found = [self._volume(name) for name in volumes_]
        if any(name_ in one.snapshots for one in found):
            raise failure("exists", f'there is a snapshot "{name_}" already')
        for one in found:
            one.snapshots[name_] = one.size

    def _delete_snapshot(self, volume_: str, name_: str) -> None:
        self._snapshot_of(volume_, name_)
        if clones := self._clones(volume_, name_):
            raise failure("busy", f'snapshot "{name_}" has clones: {", ".join(clones)}')
        found = self._volume(volume_)
        found.deleted[name_] = found.snapshots.pop(name_)

    def _keep_snapshot(self, volume_: str, name_: str) -> None:
        found = self._volume(volume_)
        if name_ not in found.deleted:
            raise failure("not_found", f'volume "{volume_}" has no snapshot "{name_}"')
        found.snapshots[name_] = found.deleted.pop(name_)

    def _reclaimable(self, volume_: str) -> dict[str, Any]:
        snapshots = self._volume(volume_).snapshots
        return {"snapshots": [(name, None if self._clones(volume_, name) else 8192) for name in snapshots]}

    def _snapshot_of(self, volume: str, name: str) -> int:
        snapshots = self._volume(volume).snapshots
        if name not in snapshots:
            raise failure("not_found", f'volume "{volume}" has no snapshot "{name}"')
        return snapshots[name]

    def _revert(self, volume_: str, name_: str) -> None:
        self._snapshot_of(volume_, name_)
        self._closed(volume_)

    def _clone(self, volume_: str, snapshot_: str | None, name_: str) -> None:
        if snapshot_ is None:
            self._new(name_, _Volume(self._volume(volume_).size))
        else:
            self._new(name_, _Volume(self._snapshot_of(volume_, snapshot_), (volume_, snapshot_)))

    def _flatten(self, volume_: str) -> None:
        found = self._volume(volume_)
        if found.origin is None:
            raise failure("invalid", f'volume "{volume_}" was not cloned, so there is nothing to copy')
        found.origin = None

    def _list(self, name_: str | None) -> dict[str, Any]:
        return {"volumes": [one for one in _list(self._content) if name_ in (None, one["name"])]}

    def _figures(self) -> dict[str, int]:
        volumes = self._content.volumes.values()
        return {
            "size": self._content.length,
            "capacity": self._content.length // 2,
            "used": sum(volume.own for volume in volumes),
            "promised": sum(volume.size for volume in volumes),
            "reclaiming": 0,
        }

    def _diff(self, volume_: str, from_: str | None, to_: str | None) -> dict[str, Any]:
        for snapshot in (from_, to_):
            if snapshot is not None:
                self._snapshot_of(volume_, snapshot)
        return {"ranges": [[0, self._volume(volume_).own]]}

    def _scrub(self, rate_: int) -> dict[str, Any]:
        if self._content.scrub is None or self._content.scrub["state"] != "running":
            counts = dict.fromkeys(("done", "blocks", "verified", "bad", "unreadable", "mended"), 0)
            self._content.scrub = {
                "started_s": 1_700_000_000,
                "total": 8 * MIB,
                **counts,
                "faults": [],
                "state": "running",
                "ended_s": None,
            }
        self._content.scrub["rate"] = rate_
        return self._scrub_status()

    def _cancel_scrub(self) -> dict[str, Any]:
        if self._content.scrub is not None:
            self._content.scrub.update(state="cancelled", ended_s=1_700_000_060)
        return self._scrub_status()

    def _scrub_status(self) -> dict[str, Any]:
        return {"scrub": self._content.scrub}

    def _grow(self) -> None:
        length = os.stat(self._path).st_size
        if length <= self._content.length:
            raise failure("invalid", "growing adds no extent")
        self._content.length = length


def _list(content: _Content) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "size": volume.size,
            "created_s": 1_700_000_000,
            "own": volume.own,
            "inherited": 4096 * len(volume.snapshots),
            "origin": volume.origin,
            "open": volume.open,
            "integrity": volume.integrity,
            "encryption": volume.key is not None,
            "deleting": [{"name": name, "total": 4096, "left": 1024} for name in volume.deleted],
            "snapshots": [
                {"name": snapshot, "size": size, "created_s": 1_700_000_000, "own": 4096}
                for snapshot, size in volume.snapshots.items()
            ],
        }
        for name, volume in content.volumes.items()
    ]


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> type[FakeStore]:
    """The engine's class, without anything."""
    monkeypatch.setattr(_engine, "Store", FakeStore, raising=False)
    for kept in (
        FakeStore.drives,
        FakeStore.opened,
        FakeStore.elsewhere,
        FakeStore.commands,
        FakeStore.failures,
    ):
        kept.clear()
    return FakeStore


def mark_of(path: Path) -> list[bytes]:
    """What the two superblocks begin with."""
    content = path.read_bytes()
    return [content[place : place + len(_MARK)] for place in _PLACES]
