"""The handover format: what the document says, the vectors have, and the other way round."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import BusyError
from ringstone.gateway.locks import NamedLocks
from ringstone.gateway.upgrade import _successor

FORMATS = Path(__file__).parents[2] / "docs/formats"
VECTORS = sorted(FORMATS.glob("vectors/handover-1*.json"))
# Members whose values are places among the descriptors.
DESCRIPTORS = {"fd", "presence", "listener", "connection", "kick", "call", "error", "backend_channel"}


def walk(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every member of every object, by name."""
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in [(key, inner), *walk(inner, key)]]
    if isinstance(value, list):
        return [item for inner in value for item in walk(inner, name)]
    return []


@pytest.mark.parametrize("vector", VECTORS, ids=lambda path: path.stem)
def test_every_descriptor_is_named_once(vector: Path) -> None:
    state = json.loads(vector.read_bytes())
    members = walk(state)
    places = [value for name, value in members if name in DESCRIPTORS and value is not None]
    places += [place for name, value in members if name == "begun_fds" for place in value]
    places += list(state.get("extras", {}).values())
    assert len(places) == len(set(places))
    assert state["format"] == 1


def test_the_document_names_every_member_of_the_vector() -> None:
    document = (FORMATS / "handover.md").read_text()
    state = json.loads((FORMATS / "vectors/handover-1.json").read_bytes())
    backends = {name for volume in state["volumes"] for name, _ in walk(volume["backend"])}
    members = {name for name, _ in walk(state)} - backends
    documented = set(re.findall(r"`([a-z_:]+)`", document))
    assert members - {"extras"} - set(state["extras"]) <= documented
    assert set(state["extras"]) <= {"api", "lock:state", "lock:run", "stderr"}


def test_a_successor_has_its_predecessors_flags() -> None:
    running = [*("/usr/bin/python3", "-P", "-m", "ringstone", "--socket", "/s"), "gateway", "--cores", "1"]
    wanted = ["--socket", "/s", "gateway", "--takeover", "--cores", "1"]
    assert _successor(running) == wanted
    assert _successor([*running, "--takeover", "--supervise"]) == wanted
    assert _successor(["/usr/bin/ringstone", "gateway"]) == ["gateway", "--takeover"]


def test_nothing_is_changed_while_everything_is_handed_over() -> None:
    locks = NamedLocks()
    with locks.frozen("upgrading", 30):
        with pytest.raises(BusyError, match="upgrading"), locks.hold("volume a"):
            pass
        with pytest.raises(BusyError, match="upgrading"), locks.frozen("again", 30):
            pass
    with locks.hold("volume a"):
        assert locks.users("volume a") == 1
