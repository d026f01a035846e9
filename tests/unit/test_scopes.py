"""Who may do what: every call of both APIs, and the scope that a token needs for it. A call that is not in the table
fails the test, so whoever adds one says who may make it."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import Route

from ringstone.api.auth import TokenRequired
from ringstone.client import RemoteClient
from ringstone.errors import DeniedError, ForbiddenError, InvalidError
from ringstone.listening import Tokens, read_tokens
from ringstone.manager.app import ManagerContext
from ringstone.manager.app import build_app as build_manager
from tests.framework.manager import TOKEN, Cluster, InProcess, cluster, http_of, ready

__all__ = ["cluster"]

LOOK = "l" * 32

_BOTH = """
look    GET     /v1/openapi.json
look    GET     /v1/pools
change  POST    /v1/pools
look    GET     /v1/pools/{name}
change  POST    /v1/pools/{name}/grow
change  POST    /v1/pools/{name}/rekey
change  POST    /v1/pools/{name}/scrub
change  DELETE  /v1/pools/{name}/scrub
change  DELETE  /v1/pools/{name}
look    GET     /v1/volumes
change  POST    /v1/volumes
look    GET     /v1/volumes/{name}
change  PATCH   /v1/volumes/{name}
change  DELETE  /v1/volumes/{name}
look    GET     /v1/volumes/{volume}/snapshots
change  POST    /v1/volumes/{volume}/snapshots
change  DELETE  /v1/volumes/{volume}/snapshots/{name}
look    GET     /v1/volumes/{volume}/deletions
change  POST    /v1/volumes/{volume}/snapshots/{name}/keep
look    GET     /v1/volumes/{volume}/reclaimable
change  POST    /v1/volumes/{volume}/snapshots/{name}/revert
change  POST    /v1/volumes/{volume}/snapshots/{name}/clone
change  POST    /v1/volumes/{volume}/clone
look    GET     /v1/volumes/{volume}/diff
change  POST    /v1/volumes/{volume}/flatten
look    GET     /v1/attachments
change  POST    /v1/attachments
look    GET     /v1/attachments/{volume}
change  DELETE  /v1/attachments/{volume}
change  PUT     /v1/attachments/{volume}/queues/{queue}
change  PUT     /v1/attachments/{volume}/sharing
change  POST    /v1/attachments/{volume}/release
look    GET     /v1/stats
look    GET     /v1/health
look    GET     /v1/events
"""
_GATEWAY = """
look    GET     /v1/gateway
look    GET     /v1/reactors
change  POST    /v1/reactors
change  DELETE  /v1/reactors/{core}
"""
_MANAGER = """
look    GET     /v1/manager
look    GET     /v1/hosts
look    GET     /v1/hosts/{name}
change  DELETE  /v1/hosts/{name}
"""


def table(*texts: str) -> dict[tuple[str, str], str]:
    """The scope, by method and path."""
    lines = [line.split() for text in texts for line in text.strip().splitlines()]
    return {(method, path): scope for scope, method, path in lines}


GATEWAY, MANAGER = table(_BOTH, _GATEWAY), table(_BOTH, _MANAGER)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return written(tmp_path / "tokens", f"{TOKEN}\n{LOOK} look\n")


def written(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def gateway_app(cluster: Cluster) -> FastAPI:
    """Of host a, without its token."""
    guarded = cluster.hosts["a"].transport._transport.app
    assert isinstance(guarded, TokenRequired)
    app = guarded._app
    assert isinstance(app, FastAPI)
    return app


def manager_app(cluster: Cluster) -> FastAPI:
    context = ManagerContext(cluster.operations(), "http://manager", "a database", 1, 0.0)
    app = build_manager(context)
    ready(app)
    return app


@pytest.fixture(params=["gateway", "manager"])
def api(request: pytest.FixtureRequest, cluster: Cluster) -> tuple[FastAPI, dict[tuple[str, str], str]]:
    if request.param == "gateway":
        return gateway_app(cluster), GATEWAY
    return manager_app(cluster), MANAGER


def calls(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Also those that the description leaves out."""
    for route in iter_route_contexts(app.routes):
        assert isinstance(route.original_route, Route), "a mounted application would need rows of its own"
        assert route.path is not None
        for method in (route.methods or set()) - {"HEAD"}:
            yield method, route.path


def test_the_table_has_every_call(api: tuple[FastAPI, dict[tuple[str, str], str]]) -> None:
    app, scopes = api
    assert set(calls(app)) == scopes.keys()


def test_a_token_that_may_look_may_do_nothing_else(
    api: tuple[FastAPI, dict[tuple[str, str], str]], token_file: Path
) -> None:
    """Every token could do everything, so who only watched a cluster could delete it."""
    app, scopes = api
    guarded = InProcess(TokenRequired(app, Tokens(token_file, report=print)))
    refused: dict[tuple[str, str], bool] = {}
    let_through: dict[tuple[str, str], bool] = {}
    for method, path in scopes:
        url = "http://nowhere" + re.sub(r"\{\w+\}", "1", path)
        for token, found in ((LOOK, refused), (TOKEN, let_through)):
            request = httpx2.Request(method, url, headers={"Authorization": f"Bearer {token}"})
            answer = guarded.handle_request(request)
            found[method, path] = answer.status_code == 403 and answer.json()["code"] == "forbidden"
    assert refused == {call: scope == "change" for call, scope in scopes.items()}
    assert not any(let_through.values())


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PROPFIND"])
def test_what_is_no_look_takes_the_right_to_change(method: str, cluster: Cluster, token_file: Path) -> None:
    guarded = InProcess(TokenRequired(gateway_app(cluster), Tokens(token_file, report=print)))
    request = httpx2.Request("GET", "http://nowhere/v1/volumes", headers={"Authorization": f"Bearer {LOOK}"})
    request.method = method
    assert guarded.handle_request(request).status_code == 403


def test_the_scope_that_is_needed_is_told(cluster: Cluster, token_file: Path) -> None:
    guarded = InProcess(TokenRequired(manager_app(cluster), Tokens(token_file, report=print)))
    with RemoteClient("http://manager", token=LOOK, transport=guarded) as client:
        assert client.volumes() == []
        with pytest.raises(ForbiddenError, match=r"The server at http://manager.*scope `look`.*`change`"):
            client.create_volume("v", pool="shared", size=1 << 20)
    assert cluster.store.volumes() == []


def test_a_managers_own_token_that_may_only_look_is_not_the_clients_fault(cluster: Cluster) -> None:
    client = cluster.client()
    cluster.token_file.write_text(f"{TOKEN} look\n{'c' * 32}\n")
    with RemoteClient("http://manager", token="c" * 32, transport=http_of(client)._transport) as other:
        with pytest.raises(DeniedError, match=r"scope `change`.*the manager's token") as told:
            other.create_volume("v", pool="shared", size=1 << 20)
        assert not isinstance(told.value, ForbiddenError)
        assert other.pools()


def test_a_line_may_have_a_scope(tmp_path: Path) -> None:
    path = written(tmp_path / "t", f"# people\n{'a' * 32}\n{'b' * 32} look\n  {'c' * 32}\tchange  \n")
    tokens = Tokens(path, report=print)
    told = [tokens.admit(letter * 32) for letter in "abcd"]
    assert told == ["change", "look", "change", None]
    # A line is no token by itself, and its owner shows the token alone.
    assert tokens.admit(f"{'b' * 32} look") is None
    assert read_tokens(path) == ["a" * 32, "b" * 32, "c" * 32]


@pytest.mark.parametrize("rest", ["lok", "LOOK", "look change", "look,change", "# mine"])
def test_a_scope_that_is_none_is_refused(tmp_path: Path, rest: str) -> None:
    """A typing error must not let anybody do more than was meant."""
    path = written(tmp_path / "t", f"{'a' * 32} {rest}\n")
    with pytest.raises(InvalidError, match="look or change"):
        Tokens(path, report=print)


def test_one_token_with_two_scopes_may_do_what_either_allows(tmp_path: Path) -> None:
    path = written(tmp_path / "t", f"{'a' * 32} look\n{'a' * 32}\n")
    assert Tokens(path, report=print).admit("a" * 32) == "change"
