"""What a host remembers of the state in etcd: the attachments that it owns, with their volumes and pools, in a file of
its own. A start without etcd serves these, as far as the storage still grants the host its epochs
(ringstone.gateway.ownership); everything else waits until etcd is back.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ringstone.errors import RingstoneError, StateError, UnreachableError, error_of_os
from ringstone.state.base import Watch
from ringstone.state.codec import from_plain, to_plain
from ringstone.state.etcd import EtcdStore
from ringstone.state.records import (
    ATTACHMENTS,
    POOLS,
    VOLUMES,
    AttachmentRecord,
    Change,
    HostRecord,
    Kind,
    R,
)
from ringstone.state.rules import Rules
from ringstone.state.settings import EtcdSettings

T = TypeVar("T")

log = logging.getLogger("ringstone.gateway")

_FORMAT, _VERSION = "ringstone-owned", 1
_KINDS: tuple[Kind[Any], ...] = (POOLS, VOLUMES, ATTACHMENTS)
# Guests wait for a start, so etcd gets only so long before it counts as away.
_FIRST_SECONDS = 2.0

Records = dict[str, dict[str, Any]]


class Memory:
    """The file. What was kept is on stable media."""

    def __init__(self, path: Path, host: str) -> None:
        self._path = path
        self._host = host
        self.records: Records = {kind.name: {} for kind in _KINDS}

    def read(self) -> bool:
        """False when there is none, or it is another host's. StateError when it cannot be used."""
        try:
            told = json.loads(self._path.read_bytes())
            if (told["format"], told["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"its version is {told['version']}, and this release knows {_VERSION}")
            if told["host"] != self._host:
                return False
            for kind in _KINDS:
                records = [from_plain(kind, values) for values in told[kind.name]]
                self.records[kind.name] = {kind.key_of(record): record for record in records}
        except FileNotFoundError:
            return False
        except OSError as error:
            raise error_of_os(error, f"reading {self._path}", "Check the state directory.") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StateError(
                f"{self._path} cannot be used ({error}). It is only a copy: remove it, and start again when etcd is "
                "within reach."
            ) from error
        return True

    def keep(self, records: Records) -> None:
        """Error of ringstone.errors when it cannot be written; what was there before is there still."""
        content = {kind.name: [to_plain(one) for one in records[kind.name].values()] for kind in _KINDS}
        text = json.dumps({"format": _FORMAT, "version": _VERSION, "host": self._host, **content})
        new = self._path.with_suffix(".new")
        try:
            with new.open("w") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise error_of_os(error, f"writing {self._path}", "Check the state directory.") from error
        self.records = records


def _quickly(settings: EtcdSettings) -> EtcdSettings:
    attempt_s = min(settings.attempt_s, _FIRST_SECONDS / 2)
    return replace(settings, attempt_s=attempt_s, total_s=min(settings.total_s, _FIRST_SECONDS))


class RememberingStore(Rules):
    """Implements ringstone.state.Store: that of etcd, whose changes are remembered as far as they are about what `host`
    owns. While `away` it is what was remembered, of which nothing can be changed but whom a successor must fence."""

    def __init__(self, settings: EtcdSettings, path: Path, host: str) -> None:
        """Errors of EtcdStore, unless there is something to go on with."""
        self._host = host
        self._memory = Memory(path, host)
        self._lock = threading.RLock()
        self._running = threading.local()
        self._changing = False
        known = self._memory.read()
        self.away = False
        self._etcd = EtcdStore(settings, connect=False)
        try:
            if known:
                EtcdStore.check(_quickly(settings))
            self._etcd.connect()
            self.remember()
        except BaseException as error:
            if not known or not isinstance(error, UnreachableError):
                self._etcd.close()
                raise
            self.away = True
            count = len(self._memory.records[ATTACHMENTS.name])
            log.warning("%s This host goes on with the %d volumes that it owned.", error, count)

    def come_back(self) -> None:
        """Go on with etcd, which was away. UnreachableError while it is, StateError when it has a newer schema. What is
        remembered stays until remember(): etcd does not know yet whom a successor must fence."""
        self._etcd.connect()
        with self._lock:
            self.away = False

    def refuse_changes(self) -> None:
        """UnreachableError while etcd is away."""
        if self.away:
            raise self._unreachable()

    def remember(self) -> None:
        """All that etcd has of this host, and nothing else."""
        own = {one.volume: one for one in self._etcd.attachments() if one.host == self._host}
        volumes = {one.name: one for one in self._etcd.volumes() if one.name in own}
        wanted = {one.pool for one in volumes.values()}
        pools = {one.name: one for one in self._etcd.pools() if one.name in wanted}
        self._memory.keep({POOLS.name: pools, VOLUMES.name: volumes, ATTACHMENTS.name: own})

    # transactions

    def transact(self, step: Callable[[], T]) -> T:
        if self.away:
            return self._transact_in_memory(step)
        if getattr(self._running, "changes", None) is not None:
            return self._etcd.transact(step)
        changes: list[tuple[Kind[Any], str, Any]] = []

        def once() -> T:
            # It may be run several times.
            changes.clear()
            return step()

        self._running.changes = changes
        try:
            result = self._etcd.transact(once)
        finally:
            self._running.changes = None
        if changes:
            self._remember(changes)
        return result

    def _transact_in_memory(self, step: Callable[[], T]) -> T:
        with self._lock:
            if self._changing or not self.away:
                # A part of the one that runs; or etcd has come back since it was asked for.
                return step() if self._changing else self.transact(step)
            before = self._memory.records
            self._changing = True
            self._memory.records = {name: dict(records) for name, records in before.items()}
            try:
                result = step()
                if self._memory.records != before:
                    self._memory.keep(self._memory.records)
            except BaseException:
                self._memory.records = before
                raise
            finally:
                self._changing = False
            return result

    def _remember(self, changes: list[tuple[Kind[Any], str, Any]]) -> None:
        """They are made already: where they cannot be kept, a start without etcd knows less."""
        try:
            with self._lock:
                records = {name: dict(kept) for name, kept in self._memory.records.items()}
                for kind, key, record in changes:
                    if kind.name == ATTACHMENTS.name:
                        self._remember_attachment(records, key, record)
                    elif kind.name in records and key in records[kind.name] and record is not None:
                        records[kind.name][key] = record
                if records != self._memory.records:
                    self._memory.keep(records)
        except RingstoneError as error:
            log.warning("A start without etcd would not know the latest change: %s", error)

    def _remember_attachment(self, records: Records, volume: str, record: AttachmentRecord | None) -> None:
        if record is None or record.host != self._host:
            records[ATTACHMENTS.name].pop(volume, None)
            gone = records[VOLUMES.name].pop(volume, None)
            if gone is not None and all(one.pool != gone.pool for one in records[VOLUMES.name].values()):
                records[POOLS.name].pop(gone.pool, None)
            return
        if volume not in records[VOLUMES.name]:
            known = self._etcd.volume(volume)
            records[VOLUMES.name][volume] = known
            records[POOLS.name][known.pool] = self._etcd.pool(known.pool)
        records[ATTACHMENTS.name][volume] = record

    # records

    def _get(self, kind: Kind[R], key: str) -> R | None:
        if not self.away:
            return self._etcd._get(kind, key)
        found: R | None = self._memory.records.get(kind.name, {}).get(key)
        return found

    def _list(self, kind: Kind[R]) -> list[R]:
        if not self.away:
            return self._etcd._list(kind)
        return [record for _, record in sorted(self._memory.records.get(kind.name, {}).items())]

    def _put(self, kind: Kind[R], record: R) -> None:
        key = kind.key_of(record)
        if not self.away:
            self._etcd._put(kind, record)
            self._running.changes.append((kind, key, record))
            return
        held = self._get(kind, key)
        if not isinstance(record, AttachmentRecord) or not isinstance(held, AttachmentRecord):
            raise self._unreachable()
        if replace(record, client=held.client) != held:
            raise self._unreachable()
        self._memory.records[kind.name][key] = record

    def _delete(self, kind: Kind[R], key: str) -> None:
        self.refuse_changes()
        self._etcd._delete(kind, key)
        self._running.changes.append((kind, key, None))

    def _at_socket(self, host: str, socket: str) -> str | None:
        if not self.away:
            return self._etcd._at_socket(host, socket)
        own: dict[str, AttachmentRecord] = self._memory.records[ATTACHMENTS.name]
        return next((name for name, one in own.items() if (one.host, one.socket) == (host, socket)), None)

    def _unreachable(self) -> UnreachableError:
        error = UnreachableError(
            f"etcd at {self._etcd.where} has not answered since this gateway's start, so nothing can be changed; what "
            "this host owned is served."
        )
        error.sent = False
        return error

    # hosts and changes

    def announce(self, host: HostRecord, ttl_s: int) -> None:
        self._etcd.announce(host, ttl_s)

    def watch(self, kind: Kind[R]) -> Watch[Change[R]]:
        return self._etcd.watch(kind)

    def close(self) -> None:
        self._etcd.close()
