"""The store of several hosts: keys of an etcd cluster. docs/formats/etcd.md is the layout.

etcd's locks are not used, and leases are only for liveness: a client whose lock or lease has run out may not know it
yet, and would write as its owner. Whatever must not be done twice is compared at the commit instead.
"""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from urllib.parse import quote

from ringstone.errors import BusyError, RingstoneError, StateError, UnreachableError
from ringstone.state.codec import from_json, is_later, to_json
from ringstone.state.etcd_client import AnswerLost, EtcdClient, Json, Refused, encode
from ringstone.state.etcd_transaction import Committer, Conflict, Snapshot, no_space, unexpected
from ringstone.state.etcd_watch import EtcdWatch
from ringstone.state.records import ALIVE, ATTACHMENTS, AliveRecord, AttachmentRecord, HostRecord, Kind, R
from ringstone.state.rules import Rules
from ringstone.state.settings import EtcdSettings

log = logging.getLogger("ringstone.gateway")

T = TypeVar("T")

SCHEMA_VERSION = 2
"""Of the layout. Whoever writes what needs a newer one raises the number, and older releases then refuse to write."""
_FIRST_VERSION = 1

# Of those who contend, one succeeds in each round.
_MOST_RUNS = 100
_FIRST_PAUSE_SECONDS = 0.005
_LONGEST_PAUSE_SECONDS = 0.2


class EtcdStore(Rules):
    """Implements ringstone.state.Store."""

    def __init__(self, settings: EtcdSettings, *, connect: bool = True) -> None:
        """`connect`: see connect(), without which nothing is changed."""
        self.prefix = settings.prefix
        self._client = EtcdClient(settings)
        self._committer = Committer(self._client, f"{self.prefix}transactions/")
        self._running = threading.local()
        self._schema_revision = 0
        self._leases: dict[str, str] = {}
        self._closed = False
        self._end_watches: list[Callable[[], None]] = []
        if connect:
            try:
                self.connect()
            except BaseException:
                self._client.close()
                raise

    def connect(self) -> None:
        """Make the layout where there is none. StateError when it is of a newer version."""
        self._open_schema()
        self._committer.sweep()

    @property
    def where(self) -> str:
        return self._client.settings.where

    @staticmethod
    def check(settings: EtcdSettings) -> None:
        """StateError when this release could not use what is there; it is left as it is."""
        with contextlib.closing(EtcdClient(settings)) as client:
            _refuse_newer(settings, Snapshot(client).get(f"{settings.prefix}schema"))

    # schema

    def _open_schema(self) -> None:
        key = f"{self.prefix}schema"
        while True:
            seen = Snapshot(self._client)
            text = seen.get(key)
            if text is not None:
                _refuse_newer(self._client.settings, text)
                self._schema_revision = seen.keys[key]
                return
            if seen.under(self.prefix):
                raise StateError(
                    f"etcd at {self._client.settings.where} has keys below {self.prefix} but no schema: they are not "
                    "Ringstone's. Choose another `etcd_prefix`."
                )
            seen.put(key, str(_FIRST_VERSION))
            # Another gateway may be the first as well.
            with contextlib.suppress(Conflict):
                self._commit(seen, [])

    # transactions

    def transact(self, step: Callable[[], T]) -> T:
        if self._snapshot() is not None:
            return step()
        for run in range(_MOST_RUNS):
            if run:
                longest = min(_FIRST_PAUSE_SECONDS * 2 ** min(run, 16), _LONGEST_PAUSE_SECONDS)
                time.sleep(random.uniform(0, longest))
            snapshot = Snapshot(self._client)
            self._running.snapshot = snapshot
            try:
                result = step()
            except Conflict:
                # What was read is compacted already.
                continue
            finally:
                self._running.snapshot = None
            if not snapshot.changes:
                return result
            try:
                self._commit(snapshot, [self._same_schema()])
            except Conflict:
                self._open_schema()
                continue
            return result
        raise BusyError("Others change the same records all the time; try again in a moment.")

    def _commit(self, snapshot: Snapshot, also: list[Json]) -> None:
        try:
            self._committer.commit(snapshot, also)
        except Refused as error:
            raise (error if error.no_lease else unexpected(error)) from error

    def _same_schema(self) -> Json:
        return {
            "key": encode(f"{self.prefix}schema"),
            "target": "MOD",
            "result": "EQUAL",
            "mod_revision": str(self._schema_revision),
        }

    def _snapshot(self) -> Snapshot | None:
        """Of the transaction that runs on this thread."""
        found: Snapshot | None = getattr(self._running, "snapshot", None)
        return found

    def _writable(self) -> Snapshot:
        snapshot = self._snapshot()
        assert snapshot is not None, "records are changed in a transaction"
        return snapshot

    # records

    def _key(self, kind: Kind[R], key: str) -> str:
        return f"{self.prefix}{kind.name}/{quote(key, safe='')}"

    def _removals(self, kind: Kind[R]) -> str:
        return f"{self.prefix}removals/{kind.name}"

    def _socket_key(self, host: str, socket: str) -> str:
        return f"{self.prefix}sockets/{quote(host, safe='')}/{quote(socket, safe='')}"

    def _get(self, kind: Kind[R], key: str) -> R | None:
        text = (self._snapshot() or Snapshot(self._client)).get(self._key(kind, key))
        return None if text is None else self.decoded(kind, text)

    def decoded(self, kind: Kind[R], text: str) -> R:
        """StateError when it is no such record."""
        try:
            return from_json(kind, text)
        except (ValueError, TypeError) as error:
            raise StateError(
                f"etcd at {self._client.settings.where} has a damaged record: {error}. Put it right with etcdctl, or "
                "restore etcd from a snapshot."
            ) from error

    def listed(self, kind: Kind[R], snapshot: Snapshot) -> list[R]:
        """By key."""
        found = snapshot.under(f"{self.prefix}{kind.name}/")
        return sorted((self.decoded(kind, text) for text in found.values()), key=kind.key_of)

    def _list(self, kind: Kind[R]) -> list[R]:
        snapshot = self._snapshot()
        if snapshot is not None:
            snapshot.get(self._removals(kind))
            return self.listed(kind, snapshot)
        while True:
            # Of more than a page, the revision that was begun with may be compacted.
            with contextlib.suppress(Conflict):
                return self.listed(kind, Snapshot(self._client))

    def _put(self, kind: Kind[R], record: R) -> None:
        snapshot = self._writable()
        key = self._key(kind, kind.key_of(record))
        if isinstance(record, AttachmentRecord):
            self._free_socket(snapshot, key)
            snapshot.put(self._socket_key(record.host, record.socket), record.volume)
        if is_later(record):
            self._raise_schema(snapshot)
        snapshot.put(key, to_json(record))

    def _raise_schema(self, snapshot: Snapshot) -> None:
        """In the same commit, so that no release before meets what it cannot read unawares."""
        key = f"{self.prefix}schema"
        if int(snapshot.get(key) or 0) < SCHEMA_VERSION:
            snapshot.put(key, str(SCHEMA_VERSION))

    def _delete(self, kind: Kind[R], key: str) -> None:
        snapshot = self._writable()
        if kind.record is AttachmentRecord:
            self._free_socket(snapshot, self._key(kind, key))
        snapshot.delete(self._key(kind, key))
        snapshot.put(self._removals(kind), key)

    def _free_socket(self, snapshot: Snapshot, key: str) -> None:
        text = snapshot.get(key)
        if text is not None:
            held = self.decoded(ATTACHMENTS, text)
            snapshot.delete(self._socket_key(held.host, held.socket))

    def _at_socket(self, host: str, socket: str) -> str | None:
        return (self._snapshot() or Snapshot(self._client)).get(self._socket_key(host, socket))

    # liveness

    def announce(self, host: HostRecord, ttl_s: int) -> None:
        for _ in range(2):
            lease = self._lease(host.name, ttl_s)
            try:
                self.transact(partial(self._announce, host, lease))
                return
            except Refused:
                # It ran out in between.
                self._leases.pop(host.name, None)
        raise UnreachableError(
            f"etcd at {self._client.settings.where} lets leases of {ttl_s} s run out at once; it is too slow. Check "
            "its disks and its network."
        )

    def _announce(self, host: HostRecord, lease: str) -> None:
        self._keep_host(host)
        key = self._key(ALIVE, host.name)
        # Also in place of an older lease's: after an upgrade that of the process before runs out.
        self._writable().put(key, to_json(AliveRecord(host.name, host.id)), lease)

    def _lease(self, host: str, ttl_s: int) -> str:
        """One that has `ttl_s` seconds from now."""
        lease = self._leases.get(host)
        if lease is not None:
            answer = self._client.read("/v3/lease/keepalive", {"ID": lease})
            if int(answer.get("TTL", 0)) > 0:
                return lease
        try:
            # One whose answer is lost just runs out.
            answer = self._client.read("/v3/lease/grant", {"TTL": str(ttl_s)})
        except Refused as error:
            raise (no_space(self._client, "") if error.no_space else unexpected(error)) from error
        self._leases[host] = str(answer["ID"])
        return self._leases[host]

    # changes

    def watch(self, kind: Kind[R]) -> EtcdWatch[R]:
        watch = EtcdWatch(self._client, f"{self.prefix}{kind.name}/", kind, self.decoded)
        self._end_watches.append(watch.close)
        return watch

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for end in self._end_watches:
            end()
        self._committer.close(_attempt)
        self._client.close()


def _attempt(call: Callable[[], object]) -> None:
    with contextlib.suppress(AnswerLost, Refused, RingstoneError):
        call()


def _refuse_newer(settings: EtcdSettings, text: str | None) -> None:
    if text is None:
        return
    if not text.isdigit() or int(text) > SCHEMA_VERSION:
        raise StateError(
            f"The state in etcd at {settings.where} below {settings.prefix} has schema {text}, and this Ringstone "
            f"knows up to {SCHEMA_VERSION}. Install the newer Ringstone on this host too, or use another `etcd_prefix`."
        )
