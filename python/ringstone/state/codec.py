"""Records as JSON objects and back: the values of etcd, the rows of an export, and the columns of SQLite."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from ringstone.state.records import JsonValue, Kind, R, VolumeState

# Fields whose type JSON does not have.
_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "state": VolumeState,
    "addresses": tuple,
    "cores": tuple,
}


# Those that came after the first layout.
_LATER = frozenset({"socket_owner", "socket_group", "socket_mode"})


def is_later(record: Any) -> bool:
    """Whether a release that has the first layout could not read it."""
    return any(getattr(record, name, None) is not None for name in _LATER)


def to_plain(record: Any) -> dict[str, JsonValue]:
    """The record's fields, as JSON has them, without later ones that say nothing: a release before reads it then."""
    values = all_fields(record)
    return {name: value for name, value in values.items() if name not in _LATER or value is not None}


def all_fields(record: Any) -> dict[str, JsonValue]:
    """As JSON has them."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_plain(kind: Kind[R], values: Mapping[str, Any]) -> R:
    """ValueError says what is wrong with `values`, if anything is."""
    known = {field.name: field for field in fields(kind.record)}
    unknown = sorted(values.keys() - known.keys())
    missing = sorted(
        name
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    )
    if unknown or missing:
        wrong = [f"unknown {name}" for name in unknown] + [f"missing {name}" for name in missing]
        raise ValueError(f"a record of {kind.name} has {', '.join(wrong)}")
    converted = {
        name: _FROM_JSON[name](value) if name in _FROM_JSON else value for name, value in values.items()
    }
    return kind.record(**converted)


def to_json(record: Any) -> str:
    return json.dumps(to_plain(record), separators=(",", ":"), sort_keys=True)


def from_json(kind: Kind[R], text: str | bytes) -> R:
    """ValueError when it is none."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a record of {kind.name} is no object")
    return from_plain(kind, values)
