"""A manager over a real store, and hosts whose gateways are real applications in this process, over engines that serve
nobody."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import time_ns

import httpx2
import pytest
from starlette.types import ASGIApp

from ringstone.api.app import build_app
from ringstone.api.auth import TokenRequired
from ringstone.api.context import ApiContext
from ringstone.client import RemoteClient
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.events import EventLog
from ringstone.gateway.service import Service
from ringstone.listening import Tokens
from ringstone.manager.app import ManagerContext
from ringstone.manager.app import build_app as build_manager
from ringstone.manager.hosts import Connect, Hosts
from ringstone.manager.operations import Operations
from ringstone.manager.tokens import GatewayTokens
from ringstone.remote_peer import RemotePeer
from ringstone.state import ALIVE, HostRecord, PoolRecord, SqliteStore
from ringstone.state.records import Kind, R
from ringstone.stats import StatsPage
from tests.framework import stats_vector
from tests.framework.engine import FakeEngine

TOKEN = "a" * 32


class InProcess(httpx2.BaseTransport):
    """Calls an application without a server. `failure`: raised instead, or with `after` when the application has done
    what was asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        self.failure: Callable[[], Exception] | None = None
        self.after = False
        self.asked: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(f"{request.method} {request.url.path}")
        if self.failure is not None and not self.after:
            raise self.failure()
        sent = httpx2.Request(request.method, request.url, headers=request.headers, content=request.read())

        async def call() -> httpx2.Response:
            response = await self._transport.handle_async_request(sent)
            body = await response.aread()
            return httpx2.Response(response.status_code, headers=response.headers, content=body)

        answer = asyncio.run(call())
        if self.failure is not None:
            raise self.failure()
        return answer


class LeasedStore(SqliteStore):
    """A database whose hosts may die, as those of etcd do."""

    dead: set[str]

    def _get(self, kind: Kind[R], key: str) -> R | None:
        return None if kind.name == ALIVE.name and key in self.dead else super()._get(kind, key)

    def _list(self, kind: Kind[R]) -> list[R]:
        found = super()._list(kind)
        return [one for one in found if kind.name != ALIVE.name or kind.key_of(one) not in self.dead]


@dataclass
class FakeHost:
    name: str
    service: Service
    engine: FakeEngine
    transport: InProcess


def ready(app: ASGIApp) -> ASGIApp:
    """FastAPI builds its routes when a request is first held against them, and hides a warning meanwhile, which does
    not hold when two threads do that at once."""
    InProcess(app).handle_request(httpx2.Request("GET", "http://nowhere/v1/nothing"))
    return app


@dataclass
class Cluster:
    """Hosts of one store, and managers."""

    root: Path
    store: LeasedStore
    hosts: dict[str, FakeHost] = field(default_factory=dict)
    token_file: Path = field(init=False)
    _closing: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_file = self.root / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(f"{TOKEN}\n")

    def add_host(self, name: str, *, free_cores: int = 0) -> FakeHost:
        folder = self.root / name
        folder.mkdir()
        (folder / "stats").write_bytes(stats_vector.golden_page())
        engine = FakeEngine()
        service = Service(
            self.store, engine, EventLog(), run_dir=folder, state_dir=folder, reactors=1, host=name
        )
        config = GatewayConfig((0,), 200, folder, folder, folder / "gateway.sock", "info", host=name)
        stats = StatsPage(folder / "stats")
        self._closing.append(stats.close)
        app = ready(build_app(ApiContext(config, service, stats, "1", 0)))
        host = FakeHost(
            name, service, engine, InProcess(TokenRequired(app, Tokens(self.token_file, report=print)))
        )
        self.hosts[name] = host
        address = (f"http://{name}:7480",)
        record = HostRecord(name, f"id of {name}", address, "1.0", (1,), free_cores, time_ns(), 1)
        self.store.announce(record, 15)
        return host

    def shared_pool(self, name: str = "shared") -> None:
        """One that every host reaches; of a type that needs no cluster."""
        self.store.add_pool(PoolRecord(name, "null", None, None, 1))

    def local_pool(self, host: str, name: str = "local") -> None:
        self.store.add_pool(PoolRecord(name, "null", None, None, 1, host=host))

    def operations(
        self, connects: Mapping[str, Connect] | None = None, tokens: GatewayTokens | None = None
    ) -> Operations:
        """Of one more manager. `connects`: for hosts that are reached otherwise than in this process. `tokens`: other
        ones than that of the token file."""

        def connect(host: str, url: str, token: str, timeout: float) -> RemoteClient:
            if connects is not None and host in connects:
                return connects[host](host, url, token, timeout)
            transport = self.hosts[host].transport
            return RemoteClient(url, token=token, timeout=timeout, peer=f"host {host!r}", transport=transport)

        hosts = Hosts(self.store, tokens or GatewayTokens(self.token_file), connect)
        self._closing.append(hosts.close)
        return Operations(self.store, hosts, EventLog("ringstone.manager"))

    def client(self, operations: Operations | None = None) -> RemoteClient:
        """Of a manager."""
        context = ManagerContext(operations or self.operations(), "http://manager", "a database", 1, 0.0)
        app = TokenRequired(ready(build_manager(context)), Tokens(self.token_file, report=print))
        client = RemoteClient("http://manager", token=TOKEN, transport=InProcess(app))
        self._closing.append(client.close)
        return client

    def kill(self, name: str) -> None:
        """Its lease is over, and nobody answers."""
        self.store.dead.add(name)
        self.hosts[name].transport.failure = refused

    def revive(self, name: str) -> None:
        self.store.dead.discard(name)
        self.hosts[name].transport.failure = None

    def forget_address(self, name: str) -> None:
        record = next(host for host in self.store.hosts() if host.name == name)
        self.store.announce(replace(record, addresses=()), 15)

    def close(self) -> None:
        for close in reversed(self._closing):
            close()
        self.store.close()


def http_of(client: RemoteClient) -> httpx2.Client:
    """What `client` speaks HTTP with."""
    assert isinstance(client._peer, RemotePeer)
    return client._peer._http


def refused() -> Exception:
    return httpx2.ConnectError("[Errno 111] Connection refused")


def timed_out() -> Exception:
    return httpx2.ReadTimeout("timed out")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Hosts a, b (which has most free cores) and c, and a pool `shared` on all of them."""
    root = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/tmp"))
    store = LeasedStore(root / "ringstone.db")
    store.dead = set()
    cluster = Cluster(root, store)
    try:
        for name, free_cores in (("a", 1), ("b", 5), ("c", 2)):
            cluster.add_host(name, free_cores=free_cores)
        cluster.shared_pool()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(root)
