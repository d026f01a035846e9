"""Changes of a collection, told by etcd as they are made.

A watch is a hint that comes early; it is never what keeps two owners apart. It goes on over members that fail,
connections that are lost and revisions that were compacted: it resumes behind the last revision it saw, or lists anew
and tells what differs.
"""

import contextlib
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Generic
from urllib.parse import unquote

import httpx2

from ringstone.errors import RingstoneError
from ringstone.state.etcd_client import AnswerLost, EtcdClient, Json, Refused, decode, encode
from ringstone.state.etcd_transaction import Conflict, Snapshot, range_end
from ringstone.state.records import Change, Kind, R, differences

# A member that is cut off from the others, or stopped, says nothing either; so the next one is asked now and then.
_QUIET_SECONDS = 10.0
_LONGEST_PAUSE_SECONDS = 1.0


class EtcdWatch(Generic[R]):
    """Implements ringstone.state.Watch."""

    def __init__(
        self, client: EtcdClient, prefix: str, kind: Kind[R], decoded: Callable[[Kind[R], str], R]
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._kind: Kind[R] = kind
        self._decoded: Callable[[Kind[R], str], R] = decoded
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Change[R]]:
        known: dict[str, R] = {}
        while not self._closed.is_set():
            try:
                snapshot = Snapshot(self._client)
                found = snapshot.under(self._prefix)
                now = {self._name(key): self._decoded(self._kind, text) for key, text in found.items()}
            except (RingstoneError, Refused, Conflict):
                self._pause()
                continue
            yield from differences(known, now)
            known = now
            yield from self._follow(snapshot.revision + 1, known)
            self._pause()

    def _name(self, key: str) -> str:
        return unquote(key.removeprefix(self._prefix))

    def _pause(self) -> None:
        self._closed.wait(random.uniform(0.1, 1) * _LONGEST_PAUSE_SECONDS)

    def _follow(self, revision: int, known: dict[str, R]) -> Iterator[Change[R]]:
        """From `revision` on, until that is no longer there or a record cannot be read."""
        while not self._closed.is_set():
            try:
                for result in self._answers(revision):
                    if result.get("canceled"):
                        return
                    for event in result.get("events", []):
                        revision = max(revision, int(event["kv"]["mod_revision"]) + 1)
                        change = self._change(event)
                        if known.get(change.key) == change.record:
                            continue
                        if change.record is None:
                            known.pop(change.key, None)
                        else:
                            known[change.key] = change.record
                        yield change
            except AnswerLost as error:
                if not isinstance(error.__cause__, httpx2.ReadTimeout):
                    self._pause()
            except (RingstoneError, Refused):
                return

    def _change(self, event: Json) -> Change[R]:
        item = event["kv"]
        gone = event.get("type") == "DELETE"
        record = None if gone else self._decoded(self._kind, decode(item["value"]))
        return Change(self._name(decode(item["key"])), record)

    def _answers(self, revision: int) -> Iterator[Json]:
        request = {
            "key": encode(self._prefix),
            "range_end": encode(range_end(self._prefix)),
            "start_revision": str(revision),
        }
        with self._client.stream("/v3/watch", {"create_request": request}, _QUIET_SECONDS) as response:
            if not self._hold(response):
                return
            try:
                for line in response.iter_lines():
                    answer = json.loads(line)
                    if "result" not in answer:
                        raise AnswerLost(str(answer))
                    yield answer["result"]
            finally:
                with self._lock:
                    self._connection = None

    def _hold(self, response: httpx2.Response) -> bool:
        """So that close() can end the wait; False when it has been called."""
        with self._lock:
            self._connection = response.extensions["network_stream"].get_extra_info("socket")
            return not self._closed.is_set()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            if self._connection is not None:
                # Of the socket itself, as TLS would take its own state away from the thread that reads.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
