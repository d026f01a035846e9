"""What an API does at once and for how long, on applications of the gateway over an engine or a store that hangs."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from ringstone.api import health, limits
from ringstone.api.app import build_app
from ringstone.api.context import ApiContext
from ringstone.api.limits import BODY_BYTES, Limits
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.events import EventLog
from ringstone.gateway.service import Service
from ringstone.state import PoolRecord, SqliteStore
from ringstone.stats import StatsPage
from tests.framework import stats_vector
from tests.framework.engine import FakeEngine
from tests.framework.manager import ready

MIB = 1 << 20


@dataclass
class Hanging:
    """A gateway whose engine does not come back from attaching before `go` is set."""

    context: ApiContext
    go: threading.Event = field(default_factory=threading.Event)
    begun: list[str] = field(default_factory=list)

    def before(self, call: str) -> None:
        if call.startswith("attach "):
            self.begun.append(call)
            assert self.go.wait(60)

    def run(self, client: Callable[[httpx2.AsyncClient], Awaitable[None]], **options: float) -> None:
        app = Limits(ready(build_app(self.context)), **options)  # type: ignore[arg-type]

        async def call() -> None:
            transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
            try:
                async with httpx2.AsyncClient(transport=transport, base_url="http://gateway/v1") as http:
                    await client(http)
            finally:
                self.go.set()

        asyncio.run(call())


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    (tmp_path / "stats").write_bytes(stats_vector.golden_page())
    store = SqliteStore(tmp_path / "ringstone.db")
    engine = FakeEngine()
    service = Service(store, engine, EventLog(), run_dir=tmp_path, state_dir=tmp_path, reactors=1)
    service.pools.create(PoolRecord("p", "null", None, None, 1))
    for name in "abc":
        service.volumes.create(name, "p", MIB, 512)
    config = GatewayConfig((0,), 200, tmp_path, tmp_path, tmp_path / "gateway.sock", "info")
    with StatsPage(tmp_path / "stats") as stats:
        one = Hanging(ApiContext(config, service, stats, "0.0.0", 1))
        engine.before = one.before
        yield one
    store.close()


async def until(http: httpx2.AsyncClient, method: str, path: str, status: int) -> httpx2.Response:
    """The answer, once it has that status: what was asked before may only begin, or end."""
    async with asyncio.timeout(20):
        while True:
            answer = await http.request(method, path)
            if answer.status_code == status:
                return answer
            await asyncio.sleep(0.01)


def test_changes_that_hang_leave_the_looks_and_the_health(hanging: Hanging) -> None:
    async def client(http: httpx2.AsyncClient) -> None:
        going = [
            asyncio.create_task(http.post("/attachments", json={"volume": name}, timeout=60)) for name in "ab"
        ]
        async with asyncio.timeout(20):
            while len(hanging.begun) < 2:  # noqa: ASYNC110 - it is a thread that adds to it
                await asyncio.sleep(0.01)
        refused = await http.delete("/volumes/nothing")
        assert refused.status_code == 503
        assert refused.json()["code"] == "busy"
        assert "2 calls of this kind" in refused.json()["message"]
        assert (await http.get("/volumes/a/snapshots")).status_code != 503
        assert (await http.get("/health")).status_code == 200
        hanging.go.set()
        assert [(await one).status_code for one in going] == [201, 201]
        assert (await http.post("/attachments", json={"volume": "c"})).status_code == 201

    hanging.run(client, changes=2)


def test_looks_that_hang_are_answered_and_counted_until_they_end(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = hanging.context.service.engine
    volumes = engine.volumes
    asked = threading.Semaphore(0)

    def slow() -> object:
        asked.release()
        assert hanging.go.wait(60)
        return volumes()

    monkeypatch.setattr(engine, "volumes", slow)
    monkeypatch.setattr(health, "_WAIT_SECONDS", 0.2)

    async def client(http: httpx2.AsyncClient) -> None:
        looks = await asyncio.gather(*(http.get("/volumes") for _ in range(2)))
        for look in looks:
            assert (look.status_code, look.json()["code"]) == (503, "busy")
            assert "has not come back for 0.3 s" in look.json()["message"]
        assert all(asked.acquire(timeout=10) for _ in range(2))
        # Their threads are still there.
        assert "2 calls of this kind" in (await http.get("/events")).json()["message"]
        told = (await http.get("/health")).json()
        assert told["status"] == "degraded"
        assert "has not come back" in told["reasons"][0]
        hanging.go.set()
        await until(http, "GET", "/volumes", 200)
        assert (await http.get("/health")).json()["status"] == "ok"

    hanging.run(client, looks=2, look_seconds=0.3)


def test_a_body_has_a_limit(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 64 << 10
            yield bytes(64 << 10)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def client(http: httpx2.AsyncClient) -> None:
        for body in (bytes(BODY_BYTES + 1), endless()):
            answer = await http.post("/volumes", content=body)
            assert (answer.status_code, answer.json()["code"]) == (413, "invalid")
            assert str(BODY_BYTES) in answer.json()["message"]
        assert sent < 2 * BODY_BYTES
        answer = await http.post("/volumes", content=slow())
        assert (answer.status_code, answer.headers["connection"]) == (408, "close")
        # At the limit it is read, and found to be no good for other reasons.
        answer = await http.post("/volumes", content=b" " * BODY_BYTES)
        assert answer.status_code == 422

    hanging.run(client)
