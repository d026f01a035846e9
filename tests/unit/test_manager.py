"""The manager's decisions: who is asked to do what, and what is shown of hosts that do not answer."""

from collections.abc import Callable
from dataclasses import replace
from time import time_ns

import pytest

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.errors import (
    BusyError,
    DeniedError,
    ExistsError,
    InvalidError,
    NotFoundError,
    StorageError,
    UnauthorizedError,
    UnreachableError,
)
from tests.framework.manager import Cluster, InProcess, cluster, http_of, refused, timed_out

__all__ = ["cluster"]

MIB = 1 << 20


@pytest.fixture
def client(cluster: Cluster) -> RemoteClient:
    return cluster.client()


def made(client: RemoteClient, *names: str, pool: str = "shared") -> None:
    for name in names:
        client.create_volume(name, pool=pool, size=MIB)


def asked(cluster: Cluster, what: str) -> list[str]:
    """The hosts that were asked for it."""
    return [name for name, host in cluster.hosts.items() if what in host.transport.asked]


# placement


def test_a_shared_volume_is_attached_where_most_cores_are_free(
    cluster: Cluster, client: RemoteClient
) -> None:
    made(client, "v", "w")
    assert client.attach("v").host == "b"
    assert client.attach("w", host="c").host == "c"
    assert [one.volume for one in cluster.hosts["b"].engine.attachments()] == ["v"]
    assert {host.name: host.attachments for host in client.hosts()} == {"a": 0, "b": 1, "c": 1}


def test_what_every_host_can_do_goes_to_the_least_loaded(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v", "w")
    client.attach("v", host="b")
    client.attach("w", host="c")
    made(client, "x")
    assert asked(cluster, "POST /v1/volumes") == ["a", "b"]  # b at first, with the most free cores


def test_another_host_is_asked_when_one_was_not_reached(cluster: Cluster, client: RemoteClient) -> None:
    cluster.hosts["b"].transport.failure = refused
    made(client, "v")
    assert asked(cluster, "POST /v1/volumes") == ["b", "c"]
    assert client.attach("v").host == "c"


def test_nobody_else_is_asked_when_it_may_have_been_done(cluster: Cluster, client: RemoteClient) -> None:
    transport = cluster.hosts["b"].transport
    transport.failure, transport.after = timed_out, True
    with pytest.raises(UnreachableError, match="did not answer"):
        made(client, "v")
    assert asked(cluster, "POST /v1/volumes") == ["b"]
    assert [volume.name for volume in cluster.store.volumes()] == ["v"]


def test_a_local_pool_is_used_on_its_host(cluster: Cluster, client: RemoteClient) -> None:
    cluster.local_pool("c")
    made(client, "v", pool="local")
    assert client.attach("v").host == "c"
    client.detach("v")
    with pytest.raises(InvalidError, match="is on host 'c'"):
        client.attach("v", host="a")
    with pytest.raises(InvalidError, match="leave ha out"):
        client.attach("v", ha=True)
    client.delete_volume("v")
    client.delete_pool("local")
    assert asked(cluster, "DELETE /v1/pools/local") == ["c"]


def test_a_pool_of_one_host_needs_its_name(cluster: Cluster, client: RemoteClient) -> None:
    with pytest.raises(InvalidError, match="--host"):
        client.create_pool(models.PoolCreate(name="p", type="null"))
    pool = client.create_pool(models.PoolCreate(name="p", type="null", host="c"))
    assert (pool.host, asked(cluster, "POST /v1/pools")) == ("c", ["c"])
    with pytest.raises(NotFoundError, match="host list"):
        client.create_pool(models.PoolCreate(name="q", type="null", host="nobody"))


def test_changes_of_an_attached_volume_go_to_its_host(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    client.attach("v", host="a")
    client.resize_volume("v", 2 * MIB)
    assert asked(cluster, "PATCH /v1/volumes/v") == ["a"]
    assert client.share("v", True).shared
    client.detach("v")
    with pytest.raises(NotFoundError, match="not attached"):
        client.detach("v")
    assert asked(cluster, "DELETE /v1/attachments/v") == ["a"]


def test_a_gateway_answers_for_no_other_host(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    with (
        RemoteClient("http://a", token="a" * 32, transport=cluster.hosts["a"].transport) as direct,
        pytest.raises(InvalidError, match="This is host 'a'"),
    ):
        direct.attach("v", host="b")


# errors


def test_errors_of_a_gateway_are_passed_on_as_they_are(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    with pytest.raises(ExistsError, match="exists"):
        made(client, "v")
    cluster.hosts["a"].engine.failures["open_volume"] = StorageError("The drive is on fire; call somebody.")
    with pytest.raises(StorageError, match="on fire"):
        client.attach("v", host="a")
    client.attach("v", host="a")
    with pytest.raises(ExistsError, match="attached"):
        client.attach("v", host="b")


def test_a_gateway_that_refuses_the_manager_is_not_the_clients_fault(
    cluster: Cluster, client: RemoteClient
) -> None:
    cluster.token_file.write_text("b" * 32 + "\n")
    changed = RemoteClient("http://manager", token="b" * 32, transport=_transport(client))
    for host in cluster.hosts.values():
        host.transport.failure = None
    cluster.hosts["b"].transport._transport.app._tokens = _Nobody()  # type: ignore[attr-defined]
    with pytest.raises(DeniedError, match="the manager's token"):
        changed.create_volume("v", pool="shared", size=MIB)
    changed.close()


class _Nobody:
    def admit(self, token: str) -> None:
        return None


def _transport(client: RemoteClient) -> InProcess:
    transport = http_of(client)._transport
    assert isinstance(transport, InProcess)
    return transport


def test_a_client_without_the_token_is_refused(client: RemoteClient) -> None:
    for token in ("", "x" * 32):
        with (
            RemoteClient("http://manager", token=token, transport=_transport(client)) as stranger,
            pytest.raises(UnauthorizedError),
        ):
            stranger.volumes()


# hosts that do not answer


@pytest.mark.parametrize("failure", [refused, timed_out])
def test_a_host_that_does_not_answer_is_shown_as_such(
    cluster: Cluster, client: RemoteClient, failure: Callable[[], Exception]
) -> None:
    made(client, "v", "w")
    client.attach("v", host="a")
    client.attach("w", host="b")
    assert client.health().status == "ok"
    cluster.hosts["a"].transport.failure = failure
    states = {one.volume: one.state for one in client.attachments()}
    assert states == {"v": "unreachable", "w": "listening"}
    assert [volume.state for volume in client.volumes()] == ["ready", "ready"]
    shown = client.volume("v").attachment
    assert shown is not None
    assert shown.reason is not None
    assert "host 'a'" in shown.reason.lower()
    assert any("Host a does not answer" in reason for reason in client.health().reasons)


@pytest.mark.parametrize(("behind_s", "said"), [(90, "90 s behind"), (-60, "s ahead of"), (10, ""), (-2, "")])
def test_a_clock_that_is_off_is_told(
    cluster: Cluster, client: RemoteClient, behind_s: int, said: str
) -> None:
    record = next(host for host in cluster.store.hosts() if host.name == "a")
    cluster.store.announce(replace(record, seen_ns=time_ns() - behind_s * 10**9), 15)
    reasons = client.health().reasons
    assert [said in reason and "host a" in reason for reason in reasons] == ([True] if said else [])


def test_a_dead_host_is_not_even_asked(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    client.attach("v", host="a")
    cluster.kill("a")
    cluster.hosts["a"].transport.asked.clear()
    assert client.attachment("v").state == "unreachable"
    assert cluster.hosts["a"].transport.asked == []
    assert [host.alive for host in client.hosts()] == [False, True, True]
    assert client.health().reasons == ["Host a is dead, with 1 volumes attached there."]
    with pytest.raises(UnreachableError, match="--take-over"):
        client.detach("v")


def test_no_host_at_all(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    for name in cluster.hosts:
        cluster.kill(name)
    assert [(pool.state, pool.volumes) for pool in client.pools()] == [("failed", 1)]
    for change in (lambda: made(client, "w"), lambda: client.attach("v")):
        with pytest.raises(UnreachableError, match="Start a gateway"):
            change()


def test_a_gateway_without_tcp_is_told(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    cluster.forget_address("a")
    with pytest.raises(UnreachableError, match="Set listen"):
        client.attach("v", host="a")


def test_a_dead_host_is_removed_when_it_has_nothing(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    client.attach("v", host="a")
    with pytest.raises(BusyError, match="alive"):
        client.remove_host("a")
    cluster.kill("a")
    with pytest.raises(BusyError, match="attached"):
        client.remove_host("a")
    client.attach("v", host="b", take_over=True)
    client.remove_host("a")
    assert [host.name for host in client.hosts()] == ["b", "c"]


# take-over


def test_a_volume_is_taken_over_by_one_command(cluster: Cluster, client: RemoteClient) -> None:
    made(client, "v")
    first = client.attach("v", host="a")
    # Without a host: anywhere but there.
    second = client.attach("v", take_over=True)
    assert (second.host, second.epoch) == ("b", first.epoch + 1)
    cluster.kill("b")
    assert client.attach("v", host="c", take_over=True).epoch == first.epoch + 2


# the rest of the API


def test_the_manager_tells_of_itself(client: RemoteClient) -> None:
    told = client.manager()
    assert (told.hosts, told.hosts_alive, told.pools, told.state) == (3, 3, 1, "a database")
    assert client.events() == []
    made(client, "v")
    with pytest.raises(InvalidError, match="one volume at a time"):
        client.stats()


def test_openapi_describes_it(client: RemoteClient) -> None:
    described = http_of(client).get("/openapi.json").json()
    assert {"/v1/hosts", "/v1/pools", "/v1/volumes/{volume}/snapshots", "/v1/attachments"} <= set(
        described["paths"]
    )
