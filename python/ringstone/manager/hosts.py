"""The hosts as the manager reaches them: whose gateway answers, and which one is asked to do what."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ringstone.client import RemoteClient
from ringstone.errors import (
    DeniedError,
    ForbiddenError,
    NotFoundError,
    RingstoneError,
    UnauthorizedError,
    UnreachableError,
    UntrustedError,
)
from ringstone.manager.tokens import GatewayTokens
from ringstone.manager.trust import check_url
from ringstone.state import HostRecord, Store

T = TypeVar("T")

_CONNECT_SECONDS = 3.0
# A look must not wait for a host that hangs; a change may have a storage to wait for.
_LOOK_SECONDS = 5.0
_CHANGE_SECONDS = 120.0
_MOST_ASKED_AT_ONCE = 16

Connect = Callable[[str, str, str, float], RemoteClient]
"""From a host's name, its gateway's URL, the token and the seconds that an answer may take."""


def connector(ca: Path | None) -> Connect:
    """To gateways that prove with a certificate of `ca` (None: of the system's authorities) to be the host that is
    meant. The functions raise UntrustedError where nobody could."""

    def connect(host: str, url: str, token: str, timeout: float) -> RemoteClient:
        check_url(host, url, ca=ca)
        return RemoteClient(
            url,
            token=token,
            ca=ca,
            timeout=timeout,
            connect_timeout=_CONNECT_SECONDS,
            peer=f"the gateway of host {host!r} at {url}",
            server_name=host,
        )

    return connect


class Hosts:
    """Usable from any thread."""

    def __init__(self, store: Store, tokens: GatewayTokens, connect: Connect) -> None:
        self._store = store
        self._tokens = tokens
        self._connect = connect
        self._lock = threading.Lock()
        # By host, URL, token and patience; connections are kept open in them. By host too, as each has proved one name.
        self._clients: dict[tuple[str, str, str, float], RemoteClient] = {}
        self._pool = ThreadPoolExecutor(_MOST_ASKED_AT_ONCE, thread_name_prefix="ask")

    def close(self) -> None:
        self._pool.shutdown()
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def record(self, name: str) -> HostRecord:
        """NotFoundError when there is no such host."""
        for host in self._store.hosts():
            if host.name == name:
                return host
        raise NotFoundError(f"There is no host {name!r}; `ringstone host list` shows those there are.")

    # one host

    def change(self, name: str, step: Callable[[RemoteClient], T]) -> T:
        """Have the gateway of host `name` do something. What it answers is raised as it is; UnreachableError when the
        host is dead or does not answer."""
        if not self._store.host_alive(name):
            error = UnreachableError(
                f"Host {name!r} is dead: it has not announced itself lately. Start its gateway; or, for a volume that "
                "is attached there, attach it to another host with --take-over."
            )
            error.sent = False
            self.record(name)
            raise error
        return self._ask(self.record(name), step, _CHANGE_SECONDS)

    def look(self, name: str, step: Callable[[RemoteClient], T]) -> T:
        """As change(), for what may not take long."""
        if not self._store.host_alive(name):
            raise UnreachableError(f"Host {name!r} is dead: it has not announced itself lately.")
        return self._ask(self.record(name), step, _LOOK_SECONDS)

    def look_at(
        self, names: Iterable[str], step: Callable[[RemoteClient], T]
    ) -> dict[str, T | RingstoneError]:
        """Of several hosts at once; the error of those that did not answer."""

        def attempt(name: str) -> T | RingstoneError:
            try:
                return self.look(name, step)
            except RingstoneError as error:
                return error

        asked = {name: self._pool.submit(attempt, name) for name in set(names)}
        return {name: answer.result() for name, answer in asked.items()}

    def _ask(self, host: HostRecord, step: Callable[[RemoteClient], T], timeout: float) -> T:
        if not host.addresses:
            raise UnreachableError(
                f"The gateway of host {host.name!r} is not served over TCP. Set listen and token_file in its "
                "configuration."
            )
        failure: UnreachableError | UntrustedError | None = None
        for url in host.addresses:
            try:
                return step(self._client(host.name, url, timeout))
            except (UnauthorizedError, ForbiddenError) as error:
                # The client's own token was good; this is between the manager and the gateway.
                raise DeniedError(
                    f"{error.message} This is the manager's token: put one of that gateway's token_file into "
                    f"{self._tokens.path(host.name)}."
                ) from error
            except (UnreachableError, UntrustedError) as error:
                if error.sent:
                    raise
                failure = error
        assert failure is not None
        raise failure

    def _client(self, host: str, url: str, timeout: float) -> RemoteClient:
        token = self._tokens.of(host)
        with self._lock:
            key = (host, url, token, timeout)
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = self._connect(host, url, token, timeout)
            return client

    # any host

    def any(self, step: Callable[[RemoteClient], T], *, without: frozenset[str] = frozenset()) -> T:
        """Have a living host do what each of them can, the least loaded first, another when one is not reached or not
        trusted."""
        failure: RingstoneError | None = None
        for name in self.by_load(without):
            try:
                return self.change(name, step)
            except (UnreachableError, UntrustedError) as error:
                if error.sent:
                    raise
                failure = error
        raise failure or UnreachableError(
            "No host is alive. Start a gateway with this cluster's etcd in its configuration."
        )

    def by_load(self, without: frozenset[str] = frozenset()) -> list[str]:
        """Living hosts: those with the fewest attachments first, and of equals the one with most free cores."""
        free = self._living(without)
        load = Counter(attachment.host for attachment in self._store.attachments())
        return sorted(free, key=lambda name: (load[name], -free[name], name))

    def most_free(self, without: frozenset[str] = frozenset()) -> list[str]:
        """Living hosts: those with most free cores first, and of equals the one with the fewest attachments."""
        free = self._living(without)
        load = Counter(attachment.host for attachment in self._store.attachments())
        return sorted(free, key=lambda name: (-free[name], load[name], name))

    def _living(self, without: frozenset[str]) -> dict[str, int]:
        alive = self._store.alive_hosts() - without
        return {host.name: host.free_cores for host in self._store.hosts() if host.name in alive}
