"""Optimistic transactions over etcd: read one revision, write only if nothing of what was read has changed.

Every key that was read is compared by its mod_revision. A range that was read is compared as a whole (no key of it is
younger than the revision that was read), which sees what was added and changed; what was removed is seen by the
collection's removals key, which each removal writes.

An answer may be lost. So each commit also makes a marker, a key of its own that must not exist before. Whoever does not
know whether its commit took effect makes the marker itself, as void: either that fails, as the commit has made it, or
it succeeds and the commit can no longer take effect, however late it arrives. A commit is never sent twice.
"""

import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from ringstone.errors import InvalidError, NoSpaceError, UnreachableError
from ringstone.state.etcd_client import AnswerLost, EtcdClient, Json, Refused, decode, encode

_PAGE = 500
# etcd's --max-txn-ops: 128 comparisons and 128 operations by default.
MOST_CHANGES = 100
_MOST_COMPARISONS = 120
_MARKERS_PER_COMMIT = 8
_DAY_S = 86_400.0


class Conflict(Exception):
    """Others have changed what was read; run it again."""


def range_end(prefix: str) -> str:
    """The first key behind all that begin with `prefix`, an ASCII text."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


@dataclass(slots=True)
class Snapshot:
    """Reads of one revision, the latest when the first was made, and changes that are not made yet."""

    client: EtcdClient
    revision: int = 0
    keys: dict[str, int] = field(default_factory=dict)
    ranges: set[str] = field(default_factory=set)
    changes: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    _values: dict[str, str] = field(default_factory=dict)

    def get(self, key: str) -> str | None:
        if key in self.changes:
            return self.changes[key][0]
        if key not in self.keys and not any(key.startswith(prefix) for prefix in self.ranges):
            found = self._range({"key": encode(key)})
            self.keys[key] = int(found[0]["mod_revision"]) if found else 0
            if found:
                self._values[key] = decode(found[0]["value"])
        return self._values.get(key)

    def under(self, prefix: str) -> dict[str, str]:
        """By key. The caller also reads what tells of removals."""
        if prefix not in self.ranges:
            begin, end = prefix, range_end(prefix)
            while True:
                found = self._range({"key": encode(begin), "range_end": encode(end), "limit": _PAGE})
                self._values.update({decode(item["key"]): decode(item["value"]) for item in found})
                if len(found) < _PAGE:
                    break
                begin = decode(found[-1]["key"]) + "\0"
            self.ranges.add(prefix)
        here = {key: value for key, value in self._values.items() if key.startswith(prefix)}
        for key, (value, _) in self.changes.items():
            if key.startswith(prefix):
                here.pop(key, None)
                if value is not None:
                    here[key] = value
        return dict(sorted(here.items()))

    def _range(self, body: Json) -> list[Json]:
        if self.revision:
            body["revision"] = str(self.revision)
        try:
            answer = self.client.read("/v3/kv/range", body)
        except Refused as error:
            if error.compacted:
                raise Conflict from error
            raise unexpected(error) from error
        self.revision = self.revision or int(answer["header"]["revision"])
        found: list[Json] = answer.get("kvs", [])
        return [{"value": "", **item} for item in found]

    def put(self, key: str, value: str, lease: str | None = None) -> None:
        self.changes[key] = (value, lease)

    def delete(self, key: str) -> None:
        self.changes[key] = (None, None)

    def comparisons(self) -> list[Json]:
        keys = [_compare(key, "EQUAL", revision) for key, revision in self.keys.items()]
        ranges = [
            {**_compare(prefix, "LESS", self.revision + 1), "range_end": encode(range_end(prefix))}
            for prefix in sorted(self.ranges)
        ]
        return keys + ranges

    def operations(self) -> list[Json]:
        return [
            _delete(key) if value is None else _put(key, value, lease)
            for key, (value, lease) in self.changes.items()
        ]


def unexpected(error: Refused) -> Exception:
    return InvalidError(f"etcd refuses a request: {error.reason}. Please report it.")


def _compare(key: str, result: str, revision: int) -> Json:
    return {"key": encode(key), "target": "MOD", "result": result, "mod_revision": str(revision)}


def _put(key: str, value: str, lease: str | None = None) -> Json:
    return {
        "request_put": {"key": encode(key), "value": encode(value), **({"lease": lease} if lease else {})}
    }


def _delete(key: str) -> Json:
    return {"request_delete_range": {"key": encode(key)}}


class Committer:
    """Makes snapshots' changes, with markers below `prefix`. Usable from any thread."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._lock = threading.Lock()
        self._settled: list[str] = []
        # Done markers of others, and when they were seen (CLOCK_MONOTONIC).
        self._strays: list[str] = []
        self._seen = 0.0

    def commit(self, snapshot: Snapshot, also: list[Json]) -> None:
        """All changes, provided that what was read is as it was and that the comparisons `also` hold; Conflict
        otherwise. NoSpaceError and UnreachableError say whether the changes may have been made."""
        marker = f"{self._prefix}{uuid.uuid4()}"
        settled = self._take_settled()
        comparisons = [_compare(marker, "EQUAL", 0), *also, *snapshot.comparisons()]
        operations = [_put(marker, _marker("done")), *snapshot.operations(), *map(_delete, settled)]
        if len(snapshot.changes) > MOST_CHANGES or len(comparisons) > _MOST_COMPARISONS:
            raise InvalidError(
                f"One transaction changes {len(snapshot.changes)} keys and reads {len(snapshot.keys)}; at most "
                f"{MOST_CHANGES} are possible. Change fewer records at once."
            )
        made = False
        try:
            made = self._send(marker, {"compare": comparisons, "success": operations})
        finally:
            with self._lock:
                self._settled += [marker] if made else settled
        if not made:
            raise Conflict

    def _send(self, marker: str, request: Json) -> bool:
        try:
            return bool(self._client.write("/v3/kv/txn", request).get("succeeded"))
        except AnswerLost as error:
            return self._settle(marker, str(error))
        except Refused as error:
            if not error.no_space:
                raise
            # etcd refuses what would not fit, but has made the change whose answer tells it of that. It has answered,
            # so that nothing is under way any more.
            if self._state_of(marker) == "done":
                return True
            raise no_space(self._client, "Nothing was changed.") from error

    def _settle(self, marker: str, reason: str) -> bool:
        """Whether a commit has been made whose answer was lost. If it has not, it never will be."""
        deadline = time.monotonic() + self._client.settings.total_s
        claim = {
            "compare": [_compare(marker, "EQUAL", 0)],
            "success": [_put(marker, _marker("void"))],
            "failure": [{"request_range": {"key": encode(marker)}}],
        }
        unknown = "Whether the last change was made is not known; look before it is repeated."
        while True:
            try:
                answer = self._client.write("/v3/kv/txn", claim)
            except AnswerLost as error:
                reason = str(error)
                if time.monotonic() >= deadline:
                    raise UnreachableError(f"{self._client.unreachable(reason)} {unknown}") from error
                # An election takes about a second.
                time.sleep(random.uniform(0.02, 0.2))
                continue
            except UnreachableError as error:
                raise UnreachableError(f"{error} {unknown}") from error
            except Refused as error:
                if not error.no_space:
                    raise unexpected(error) from error
                # A void marker does not fit either.
                if self._state_of(marker) == "done":
                    return True
                raise no_space(self._client, unknown) from error
            if answer.get("succeeded"):
                return False
            found = answer["responses"][0]["response_range"].get("kvs", [])
            return bool(found) and _state(found[0]) == "done"

    def _state_of(self, marker: str) -> str | None:
        found = self._client.read("/v3/kv/range", {"key": encode(marker)}).get("kvs", [])
        return _state(found[0]) if found else None

    def _take_settled(self) -> list[str]:
        with self._lock:
            if self._strays and time.monotonic() - self._seen >= _DAY_S:
                self._settled += self._strays
                self._strays = []
            taken, self._settled = (
                self._settled[:_MARKERS_PER_COMMIT],
                self._settled[_MARKERS_PER_COMMIT:],
            )
        return taken

    def sweep(self) -> None:
        """Look for what stores left behind that were not closed. It is removed once this process has known of it for a
        day, by its own clock: those who made it have long asked for it then, and hosts' clocks may differ. Void markers
        stay: each is a commit that must not take effect, and there is no telling that it is not still under way."""
        begin, end = self._prefix, range_end(self._prefix)
        strays: list[str] = []
        while True:
            body = {"key": encode(begin), "range_end": encode(end), "limit": _PAGE}
            found = self._client.read("/v3/kv/range", body).get("kvs", [])
            strays += [decode(item["key"]) for item in found if _state(item) == "done"]
            if len(found) < _PAGE:
                break
            begin = decode(found[-1]["key"]) + "\0"
        with self._lock:
            self._strays, self._seen = strays, time.monotonic()

    def close(self, attempt: Callable[[Callable[[], object]], None]) -> None:
        """Remove the markers that no commit will; `attempt` runs a call whose failure does not matter."""
        while self._settled:
            request = {"success": [_delete(marker) for marker in self._take_settled()]}
            attempt(lambda request=request: self._client.write("/v3/kv/txn", request))  # type: ignore[misc]


def _marker(state: str) -> str:
    return json.dumps({"state": state, "at_ns": time.time_ns()})


def _state(item: Json) -> str:
    return str(json.loads(decode(item["value"]))["state"])


def no_space(client: EtcdClient, what: str) -> NoSpaceError:
    return NoSpaceError(
        f"etcd at {client.settings.where} is full (NOSPACE). {what} Free some with `etcdctl compact` and `etcdctl "
        "defrag`, or raise --quota-backend-bytes, and then run `etcdctl alarm disarm`."
    )
