"""The API's answers to what only a failing engine or a broken client makes happen; the rest is tested for
real."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ringstone import models
from ringstone.api.app import build_app
from ringstone.api.context import ApiContext
from ringstone.errors import StorageError
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.events import EventLog
from ringstone.gateway.service import Service
from ringstone.state import PoolRecord, SqliteStore
from ringstone.stats import StatsPage
from tests.framework import stats_vector
from tests.framework.engine import FakeEngine

MIB = 1 << 20


class Api:
    """Calls the application in this process, without a server."""

    def __init__(self, context: ApiContext) -> None:
        self.service = context.service
        # What fails inside must arrive as an answer, as it does from the real server.
        self._transport = httpx2.ASGITransport(build_app(context), raise_app_exceptions=False)

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        async def call() -> httpx2.Response:
            async with httpx2.AsyncClient(transport=self._transport, base_url="http://gateway") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("POST", path, **options)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def api(tmp_path: Path, engine: FakeEngine) -> Iterator[Api]:
    (tmp_path / "stats").write_bytes(stats_vector.golden_page())
    store = SqliteStore(tmp_path / "ringstone.db")
    service = Service(store, engine, EventLog(), run_dir=tmp_path, state_dir=tmp_path, reactors=1)
    config = GatewayConfig((0,), 200, tmp_path, tmp_path, tmp_path / "gateway.sock", "info")
    with StatsPage(tmp_path / "stats") as stats:
        context = ApiContext(config, service, stats, "0.0.0", 1_700_000_000_123_456_789)
        service.pools.create(PoolRecord("p", "null", None, None, 1))
        service.volumes.create("alpha", "p", MIB, 512)
        yield Api(context)
    store.close()


def body(response: httpx2.Response, status: int, code: str) -> str:
    """The message of an error answer, which must have `status` and `code` and nothing else."""
    assert response.status_code == status, response.text
    answer = response.json()
    assert sorted(answer) == ["code", "message"]
    assert answer["code"] == code
    return str(answer["message"])


def test_the_schema_describes_every_noun_and_every_error(api: Api) -> None:
    schema = api.get("/v1/openapi.json").json()
    assert {path.split("/")[2] for path in schema["paths"]} == {
        "attachments",
        "events",
        "gateway",
        "health",
        "pools",
        "reactors",
        "stats",
        "volumes",
    }
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            for status in ("4XX", "5XX"):
                content = operation["responses"][status]["content"]["application/json"]
                assert content["schema"]["$ref"].endswith("/ErrorBody"), f"{method} {path}"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"not json", "JSON"),
        (b"[]", "the body"),
        (b'{"name": "v", "pool": "p", "size": "1048576"}', "size"),
        (b'{"name": "v", "pool": "p", "size": 1048576.5}', "size"),
        (b'{"name": "v", "pool": "p", "size": 0}', "size"),
        (b'{"name": "v", "pool": "p", "size": -512}', "size"),
        (b'{"name": "v", "pool": "p", "size": 9223372036854775808}', "size"),
        (b'{"name": "v", "pool": "p", "size": 512, "sise": 1}', "sise"),
        (b'{"pool": "p", "size": 512}', "name"),
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(api: Api, content: bytes, named: str) -> None:
    response = api.post("/v1/volumes", content=content, headers={"content-type": "application/json"})
    assert named in body(response, 422, "invalid")
    assert len(api.get("/v1/volumes").json()) == 1


def test_unknown_paths_and_methods_have_the_same_form(api: Api) -> None:
    assert "/v1/openapi.json" in body(api.get("/v1/tapes"), 404, "not_found")
    body(api.request("PUT", "/v1/volumes"), 405, "invalid")


def test_names_in_a_path_cannot_leave_it(api: Api) -> None:
    for name in ("%2e%2e", "..%2f..%2fetc", "%00", "a%20b", "x" * 5000):
        body(api.get(f"/v1/volumes/{name}"), 404, "not_found")


def test_an_engine_error_keeps_its_code_and_message(
    api: Api, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failures["attach"] = StorageError("The drive has gone.")
    response = api.post("/v1/attachments", json={"volume": "alpha"})
    assert body(response, 500, "io") == "The drive has gone."
    assert "The drive has gone." in caplog.text
    assert api.get("/v1/attachments").json() == []


def test_an_unforeseen_failure_is_one_answer_and_no_end(
    api: Api, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.before = lambda call: 1 / 0  # type: ignore[assignment]
    message = body(api.post("/v1/attachments", json={"volume": "alpha"}), 500, "internal")
    assert "ZeroDivisionError" in message
    assert "Traceback" in caplog.text
    engine.before = lambda call: None
    assert api.get("/v1/attachments").json() == []
    assert api.post("/v1/attachments", json={"volume": "alpha"}).status_code == 201


def test_a_connected_frontend_is_shown(api: Api, engine: FakeEngine) -> None:
    api.post("/v1/attachments", json={"volume": "alpha", "queues": 2})
    engine.connect("alpha", peer_pid=77)
    volume = models.Volume.model_validate(api.get("/v1/volumes/alpha").json())
    assert volume.attachment is not None
    assert (volume.attachment.state, volume.attachment.peer_pid) == ("running", 77)
    assert [queue.running for queue in volume.attachment.queue_states] == [True, False]
    assert volume.detail == "fake"


def test_an_attachment_is_shared_for_a_migration(api: Api, engine: FakeEngine) -> None:
    path = "/v1/attachments/alpha/sharing"
    body(api.request("PUT", path, json={"shared": True}), 404, "not_found")
    api.service.attach("alpha")
    engine.connect("alpha", peer_pid=1)
    answer = api.request("PUT", path, json={"shared": True}).json()
    assert (answer["shared"], answer["frontends"]) == (True, 1)
    engine.connect("alpha", peer_pid=2)
    body(api.request("PUT", path, json={"shared": False}), 409, "busy")
    assert api.get("/v1/attachments/alpha").json()["frontends"] == 2
    body(api.request("PUT", path, json={"shared": "perhaps"}), 422, "invalid")


def test_stats_cross_the_api_unchanged(api: Api) -> None:
    stats = api.get("/v1/stats", params={"volume": "alpha"}).json()
    assert [queue["volume"] for queue in stats["queues"]] == ["alpha"]
    assert stats["queues"][0]["read_latency"]["buckets"] == {"0": 1, "7": 1, "8": 1, "63": 1, "143": 10}
    assert len(api.get("/v1/stats").json()["queues"]) == 2
    body(api.get("/v1/stats", params={"volume": "beta"}), 404, "not_found")


def test_health_names_what_is_wrong(api: Api, tmp_path: Path) -> None:
    assert api.get("/v1/health").json() == {"status": "ok", "reasons": []}
    (tmp_path / "disk").mkdir()
    created: dict[str, Any] = {"name": "d", "type": "file", "path": str(tmp_path / "disk")}
    assert api.post("/v1/pools", json=created).status_code == 201
    volume = {"name": "v", "pool": "d", "size": MIB}
    assert api.post("/v1/volumes", json=volume).status_code == 201
    (tmp_path / "disk/v.raw").unlink()
    (tmp_path / "disk").rmdir()
    health = api.get("/v1/health").json()
    assert health["status"] == "degraded"
    assert [reason.split()[:2] for reason in health["reasons"]] == [["Pool", "d"], ["Volume", "v"]]


def test_events_are_limited_and_chosen_by_volume(api: Api) -> None:
    for number in range(3):
        api.service.events.say("info", f"line {number}", volume="alpha")
    api.service.events.say("warning", "another", volume="beta")
    events = api.get("/v1/events", params={"limit": 2, "volume": "alpha"}).json()
    assert [event["message"] for event in events] == ["line 1", "line 2"]
    body(api.get("/v1/events", params={"limit": 0}), 422, "invalid")


def test_the_gateway_describes_itself(api: Api) -> None:
    info = api.get("/v1/gateway").json()
    assert json.dumps(info["started_at"]).strip('"') == "2023-11-14T22:13:20.123456Z"
    assert (info["pools"], info["volumes"], info["attachments"]) == (1, 1, 0)
