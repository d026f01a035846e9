"""The state as one JSON document, which either store writes and reads. docs/formats/etcd.md has its layout."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ringstone.errors import ExistsError, InvalidError, RingstoneError
from ringstone.state.codec import from_plain, to_plain
from ringstone.state.records import (
    ATTACHMENTS,
    HOSTS,
    LOCAL_HOST,
    POOLS,
    VOLUMES,
    AttachmentRecord,
    HostRecord,
    JsonValue,
    Kind,
    PoolRecord,
)
from ringstone.state.rules import Rules

FORMAT = "ringstone-state"
VERSION = 1

# Each after what it refers to.
KINDS: tuple[Kind[Any], ...] = (HOSTS, POOLS, VOLUMES, ATTACHMENTS)

Item = tuple[Kind[Any], Any]


def export_state(store: Rules) -> dict[str, JsonValue]:
    """All records, of one moment."""
    found = store.transact(lambda: {kind.name: store._list(kind) for kind in KINDS})
    records: dict[str, JsonValue] = {
        name: [to_plain(record) for record in records] for name, records in found.items()
    }
    return {"format": FORMAT, "version": VERSION, **records}


def import_state(store: Rules, text: str, host: str, *, lone: bool, batch: int | None = None) -> int:
    """Put an export into an empty store; how many records that were. What was `localhost`'s becomes `host`'s, and with
    `lone` whatever the one host there is was called. `batch`: the most records of one transaction; with more than that
    it takes several, and those that were made are undone when one fails. ExistsError when the store has anything;
    InvalidError when `text` is no export, or of several hosts for a `lone` one."""
    items = _renamed(list(_read(text)), host, lone)
    size = batch or max(1, len(items))
    made: list[list[Item]] = []
    rest = iter(items)
    try:
        for number in range(max(1, math.ceil(len(items) / size))):
            part = list(islice(rest, size))
            store.transact(lambda part=part, first=number == 0: _put(store, part, first))  # type: ignore[misc]
            made.append(part)
    except RingstoneError:
        for part in reversed(made):
            store.transact(lambda part=part: _delete(store, part))  # type: ignore[misc]
        raise
    return len(items)


def _put(store: Rules, part: list[Item], first: bool) -> None:
    if first and any(store._list(kind) for kind in KINDS):
        raise ExistsError(
            "The store has state already, and an import would mix the two. Import into an empty one: another "
            "`state_dir` or `etcd_prefix`."
        )
    for kind, record in part:
        store._put(kind, record)


def _delete(store: Rules, part: list[Item]) -> None:
    for kind, record in reversed(part):
        store._delete(kind, kind.key_of(record))


def _read(text: str) -> Iterator[Item]:
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"it is no {FORMAT}")
        if document.get("version") != VERSION:
            raise ValueError(f"its version is {document.get('version')}, and this Ringstone reads {VERSION}")
        for kind in KINDS:
            for values in document[kind.name]:
                yield kind, from_plain(kind, values)
    except KeyError as error:
        raise InvalidError(f"This is no export of Ringstone's state: it has no {error}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidError(
            f"This is no export of Ringstone's state: {error}. Make one with `ringstone state export`."
        ) from error


def _renamed(items: list[Item], host: str, lone: bool) -> list[Item]:
    names = {record.name for _, record in items if isinstance(record, HostRecord)}
    names |= {record.host for _, record in items if isinstance(record, PoolRecord) and record.host}
    names |= {record.host for _, record in items if isinstance(record, AttachmentRecord)}
    if lone and len(names) > 1:
        raise InvalidError(
            f"This is the state of several hosts ({', '.join(sorted(names))}), and a database has one. Import it into "
            "etcd."
        )
    renamed = names if lone else {LOCAL_HOST}

    def of_host(record: Any) -> Any:
        if isinstance(record, HostRecord) and record.name in renamed:
            return replace(record, name=host)
        if isinstance(record, PoolRecord | AttachmentRecord) and record.host in renamed:
            return replace(record, host=host)
        return record

    return [(kind, of_host(record)) for kind, record in items]
