"""Failover: which volumes are taken over and when, by several managers at once, and what is left alone."""

import threading
from collections.abc import Callable

import pytest

from ringstone.errors import BusyError, ExistsError, StorageError, UnreachableError
from ringstone.manager.failover import Failover, request_of
from ringstone.manager.operations import Operations
from ringstone.state import AttachmentRecord
from tests.framework.manager import Cluster, cluster, refused

__all__ = ["cluster"]

MIB = 1 << 20


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watcher:
    """A failover whose rounds a test runs by hand."""

    def __init__(self, operations: Operations, grace_s: float = 0.0) -> None:
        self.clock = Clock()
        self.failover = Failover(operations, grace_s, clock=self.clock)
        self.events = operations.events

    def round(self) -> None:
        for begun in self.failover.round():
            begun.result()

    def said(self) -> list[str]:
        return [event.message for event in self.events.latest(100)]


@pytest.fixture
def watch(cluster: Cluster) -> "Callable[..., Watcher]":
    """Makes one more manager's failover."""
    return lambda grace_s=0.0: Watcher(cluster.operations(), grace_s)


def attached(cluster: Cluster, *names: str, host: str = "a", ha: bool = True) -> None:
    client = cluster.client()
    for name in names:
        client.create_volume(name, pool="shared", size=MIB)
        client.attach(name, host=host, ha=ha)


def owner(cluster: Cluster, volume: str) -> tuple[str, int]:
    held = cluster.store.attachment(volume)
    assert held is not None
    return held.host, held.epoch


def test_only_what_asks_for_it_is_taken_over(cluster: Cluster, watch: Callable[..., Watcher]) -> None:
    attached(cluster, "safe")
    attached(cluster, "kept", ha=False)
    attached(cluster, "other", host="b")
    one = watch()
    one.round()
    cluster.kill("a")
    one.round()
    # c has the fewest attachments.
    assert owner(cluster, "safe") == ("c", 2)
    assert owner(cluster, "kept") == ("a", 1)
    assert owner(cluster, "other") == ("b", 1)
    assert one.said()[0] == "Host a is dead; another one takes the volume over."
    assert one.said()[1].startswith("Host c took it over from a, in epoch 2; it is served at ")
    one.round()
    assert len(one.said()) == 2


def test_several_managers_take_a_volume_over_once(cluster: Cluster, watch: Callable[..., Watcher]) -> None:
    names = [f"v{number}" for number in range(6)]
    attached(cluster, *names)
    cluster.kill("a")
    managers = [watch() for _ in range(3)]
    threads = [threading.Thread(target=one.round) for one in managers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {owner(cluster, name)[1] for name in names} == {2}
    taken = [message for one in managers for message in one.said() if "took it over" in message]
    assert len(taken) == len(names)
    levels = {event.level for one in managers for event in one.events.latest(100)}
    assert "error" not in levels


def test_a_late_manager_takes_nothing_from_the_new_owner(cluster: Cluster) -> None:
    attached(cluster, "v")
    stale = cluster.store.attachment("v")
    assert stale is not None
    cluster.kill("a")
    operations = cluster.operations()
    operations.attach_on_one_of(["b"], request_of(stale))
    # This one has read the attachment before, and chooses another host.
    with pytest.raises(ExistsError, match="not in epoch 1"):
        operations.attach_on_one_of(["c"], request_of(stale))
    assert owner(cluster, "v") == ("b", 2)


def test_a_host_that_has_just_come_back_is_left_alone(
    cluster: Cluster, watch: Callable[..., Watcher]
) -> None:
    attached(cluster, "v")
    stale = cluster.store.attachment("v")
    assert stale is not None
    cluster.kill("a")
    one = watch(10.0)
    one.round()
    cluster.revive("a")
    # Between a manager's look and the claim.
    with pytest.raises(BusyError, match="alive again"):
        cluster.operations().attach_on_one_of(["b"], request_of(stale))
    one.round()
    assert one.said() == ["Host a is back; what is still attached there stays."]
    assert owner(cluster, "v") == ("a", 1)


def test_the_grace_counts_from_the_latest_death(cluster: Cluster, watch: Callable[..., Watcher]) -> None:
    attached(cluster, "v")
    one = watch(10.0)
    cluster.kill("a")
    one.round()
    one.clock.now += 9
    one.round()
    cluster.revive("a")
    one.round()
    cluster.kill("a")
    one.clock.now += 9
    one.round()
    assert owner(cluster, "v") == ("a", 1)
    one.clock.now += 10
    one.round()
    assert owner(cluster, "v")[1] == 2


def test_nothing_is_taken_over_while_the_store_is_out_of_reach(
    cluster: Cluster, watch: Callable[..., Watcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    attached(cluster, "v")
    one = watch(10.0)
    cluster.kill("a")
    one.round()

    def lost() -> set[str]:
        raise UnreachableError("etcd does not answer. Start it.")

    with monkeypatch.context() as broken:
        broken.setattr(cluster.store, "alive_hosts", lost)
        for _ in range(3):
            one.clock.now += 20
            one.round()
    # Told once, and the time in the dark does not count.
    assert one.said() == ["Nothing is taken over for now: etcd does not answer. Start it."]
    one.round()
    assert one.said()[1:] == ["The cluster's state is within reach again."]
    assert owner(cluster, "v") == ("a", 1)
    one.clock.now += 10
    one.round()
    assert owner(cluster, "v")[1] == 2


def test_another_host_is_tried_after_a_failure(cluster: Cluster, watch: Callable[..., Watcher]) -> None:
    attached(cluster, "v")
    one = watch()
    cluster.kill("a")
    # b is first, as it has most free cores; its cluster is out of reach, say.
    cluster.hosts["b"].engine.failures["open_volume"] = StorageError("Ceph does not answer. Look at it.")
    one.round()
    # Given back, in an epoch of its own, so that it is not forgotten.
    assert owner(cluster, "v") == ("a", 3)
    assert "Not taken over: Ceph does not answer. Look at it. It is tried again." in one.said()
    one.round()
    assert owner(cluster, "v") == ("a", 3), "not at once"
    one.clock.now += 10
    one.round()
    assert owner(cluster, "v")[0] == "c"


def test_a_host_that_is_not_reached_is_passed_over(cluster: Cluster, watch: Callable[..., Watcher]) -> None:
    attached(cluster, "v")
    one = watch()
    cluster.kill("a")
    cluster.hosts["b"].transport.failure = refused
    one.round()
    assert owner(cluster, "v")[0] == "c"


def test_with_no_host_left_it_is_told_once_and_tried_again(
    cluster: Cluster, watch: Callable[..., Watcher]
) -> None:
    attached(cluster, "v")
    one = watch()
    for name in cluster.hosts:
        cluster.kill(name)
    for _ in range(3):
        one.round()
        one.clock.now += 10
    told = [message for message in one.said() if "No other host is alive" in message]
    assert len(told) == 1
    cluster.revive("c")
    one.round()
    assert owner(cluster, "v")[0] == "c"


def test_it_runs_by_itself(cluster: Cluster) -> None:
    attached(cluster, "v")
    operations = cluster.operations()
    taken = threading.Event()
    say = operations.events.say

    def listen(level: str, message: str, *, volume: str = "") -> None:
        say(level, message, volume=volume)
        if "took it over" in message:
            taken.set()

    operations.events.say = listen  # type: ignore[method-assign]
    failover = Failover(operations, 0.0)
    failover.start()
    try:
        cluster.kill("a")
        assert taken.wait(30)
    finally:
        failover.stop()
    assert owner(cluster, "v")[1] == 2


def test_a_socket_that_was_chosen_is_kept() -> None:
    held = AttachmentRecord("v", "/run/ringstone/vhost/v.sock", 2, True, 1, "a", 3, True)
    request = request_of(held)
    assert (request.socket, request.queues, request.read_only, request.failover_epoch) == (None, 2, True, 3)
    chosen = AttachmentRecord("v", "/var/lib/vms/v.sock", 2, False, 1, "a", 3, True)
    assert request_of(chosen).socket == "/var/lib/vms/v.sock"
