"""A host among others: it lets go of what others have taken over, and takes up what they give back."""

import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone.errors import ExistsError, StateError, StorageError
from ringstone.gateway.events import Event
from ringstone.gateway.identity import host_id
from ringstone.gateway.membership import Membership
from ringstone.state import ATTACHMENTS, Change
from tests.framework.manager import Cluster, cluster

__all__ = ["cluster"]

MIB = 1 << 20
_EVENT_SECONDS = 30


class Member:
    """A host that follows the cluster's state, and a way to wait for what it says."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.service = cluster.hosts[name].service
        self._said = threading.Condition()
        add = self.service.events.add

        def listen(event: Event) -> None:
            add(event)
            with self._said:
                self._said.notify_all()

        self.service.events.add = listen  # type: ignore[method-assign]
        record = next(host for host in cluster.store.hosts() if host.name == name)
        self.membership = Membership(self.service, record)
        self.membership.start()
        self.membership.follow()

    def wait_for(self, words: str) -> None:
        def heard() -> bool:
            return any(words in event.message for event in self.service.events.latest(100))

        with self._said:
            assert self._said.wait_for(heard, _EVENT_SECONDS), self.service.events.latest(100)


@pytest.fixture
def a(cluster: Cluster) -> Iterator[Member]:
    member = Member(cluster, "a")
    client = cluster.client()
    client.create_volume("v", pool="shared", size=MIB)
    client.attach("v", host="a")
    yield member
    member.membership.stop()


def served(cluster: Cluster) -> dict[str, list[str]]:
    return {name: [one.volume for one in host.engine.attachments()] for name, host in cluster.hosts.items()}


def test_it_lets_go_of_what_another_host_has_taken_over(cluster: Cluster, a: Member) -> None:
    cluster.client().attach("v", host="b", take_over=True)
    a.wait_for("host 'b' owns it since epoch 2, and this host had epoch 1")
    with a.service.locks.hold("volume v"):
        assert served(cluster) == {"a": [], "b": ["v"], "c": []}
    told = [event for event in a.service.events.latest(100) if "not served here" in event.message]
    assert len(told) == 1


def test_it_takes_up_what_could_not_be_taken_over(cluster: Cluster, a: Member) -> None:
    """A take-over that failed left the volume without any attachment: nobody served it, and nobody knew whom to shut
    out."""
    cluster.hosts["b"].engine.failures["attach"] = StorageError("The socket is on fire.")
    with pytest.raises(StorageError, match="on fire"):
        cluster.client().attach("v", host="b", take_over=True)
    held = cluster.store.attachment("v")
    assert held is not None
    assert (held.host, held.epoch) == ("a", 3)
    a.wait_for("it is this one's again")
    with a.service.locks.hold("volume v"):
        assert served(cluster) == {"a": ["v"], "b": [], "c": []}
    assert not a.service.has_lost("v", held)


def test_an_attachment_of_its_own_is_served_once(cluster: Cluster, a: Member) -> None:
    seen = iter(cluster.store.watch(ATTACHMENTS))
    assert next(seen) == Change("v", cluster.store.attachment("v"))
    assert [call for call in cluster.hosts["a"].engine.calls if call == "attach v"] == ["attach v"]


def test_a_second_machine_of_one_name_is_refused(cluster: Cluster) -> None:
    service = cluster.hosts["a"].service
    record = next(host for host in cluster.store.hosts() if host.name == "a")
    other = Membership(service, replace(record, id="another machine"))
    with pytest.raises(ExistsError, match="Another machine runs as host 'a'"):
        other.start()
    other.stop()


def test_a_machine_keeps_its_id(tmp_path: Path) -> None:
    first = host_id(tmp_path)
    assert str(uuid.UUID(first)) == first
    assert host_id(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["host-id"]
    (tmp_path / "host-id").write_text("scribbled over")
    with pytest.raises(StateError, match="host show"):
        host_id(tmp_path)
