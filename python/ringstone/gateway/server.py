"""The control API's server: its socket, its signals, and the engine's events while it runs.

Importing this file takes longer than all the rest of a start, so the daemon does that when guests are served.
"""

import asyncio
import contextlib
import logging
import os
import socket
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from ringstone.api.app import build_app
from ringstone.api.context import ApiContext
from ringstone.api.limits import Limits
from ringstone.api.serving import Server, TcpServer
from ringstone.errors import ExistsError, RingstoneError, error_of_os
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.engine import Engine, engine_version
from ringstone.gateway.handover import Upgrade
from ringstone.gateway.notify import sd_notify
from ringstone.gateway.service import Service
from ringstone.stats import StatsPage
from ringstone.stopping import stopped_by_signals
from ringstone.version import version

log = logging.getLogger("ringstone.gateway")


def listen(path: Path) -> socket.socket:
    """The control API's socket. Nobody but the owner can connect, not even between bind and listen."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_stale(path)
        # The socket's file takes this mode when it is bound: there is no moment at which others could connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise error_of_os(error, f"listening on {path}", "Choose another --socket.") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _clear_stale(path: Path) -> None:
    """Remove a socket that no process listens on any more; ExistsError when one does, or when it is no
    socket."""
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise ExistsError(f"{path} exists and is no socket; move it away or choose another --socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Whoever listens may not be accepting: then its backlog is full, and it listens all the same.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise ExistsError(f"Another process listens on {path}; stop it first or choose another --socket.")


def _open_stats(path: Path) -> StatsPage:
    try:
        return StatsPage(path)
    except OSError as error:
        raise error_of_os(error, f"mapping {path}", "Check the run directory's filesystem.") from error


class ApiServer:
    """The API on `listener`, which is its own, and on `tcp_listener` where there is one. leave() ends it from any
    thread and leaves the socket's file to the process that goes on with it."""

    def __init__(
        self,
        config: GatewayConfig,
        service: Service,
        engine: Engine,
        listener: socket.socket,
        tcp_listener: socket.socket | None,
        started_ns: int,
        upgrade: Upgrade | None,
    ) -> None:
        self._config = config
        self._service = service
        self._engine = engine
        self._listener = listener
        self._tcp_listener = tcp_listener
        self._started_ns = started_ns
        self._upgrade = upgrade
        self._leaving = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: list[Server] = []

    def run(self) -> None:
        """Until SIGTERM, SIGINT or leave()."""
        with _open_stats(self._config.stats_path) as stats:
            context = ApiContext(
                self._config, self._service, stats, engine_version(), self._started_ns, self._upgrade
            )
            asyncio.run(self._stoppable(context))

    def leave(self) -> None:
        self._leaving = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for server in self._servers:
            server.stop()

    async def _stoppable(self, context: ApiContext) -> None:
        # The daemon has held them back while nobody could do it in order.
        with stopped_by_signals(asyncio.get_running_loop(), self._stop):
            await self._serve(context)

    async def _serve(self, context: ApiContext) -> None:
        config, engine, events = self._config, self._engine, self._service.events
        app = build_app(context)
        local = Server(Limits(app), self._listener, access_log=config.log_level == "debug")
        servers = [local, *self._over_tcp(app)]

        def drain() -> None:
            for event in engine.drain_events():
                events.add(event)

        loop = asyncio.get_running_loop()
        self._servers, self._loop = servers, loop
        if self._leaving:
            # Before there was anything to stop.
            self._stop()
        event_fd = engine.event_fd()
        loop.add_reader(event_fd, drain)
        drain()
        try:
            log.info(
                "Ringstone %s serves its API on %s, with reactors on CPU %s.",
                version(),
                config.socket,
                ", ".join(map(str, config.cores)),
            )
            # The kernel queues connections from listen() on, so a client that sees READY can connect at once.
            # MAINPID matters after a takeover only, where another process was the main one.
            sd_notify(f"READY=1\nMAINPID={os.getpid()}" if self._upgrade else "READY=1")
            await asyncio.gather(*(server.run_on_listener() for server in servers))
        finally:
            loop.remove_reader(event_fd)
            drain()
            if not self._leaving:
                sd_notify("STOPPING=1")
                with contextlib.suppress(FileNotFoundError):
                    config.socket.unlink()

    def _over_tcp(self, app: FastAPI) -> list[Server]:
        listening, listener = self._config.listening, self._tcp_listener
        if listening is None or listener is None:
            return []
        try:
            server = TcpServer(
                app,
                listening,
                listener,
                access_log=self._config.log_level == "debug",
                report=partial(self._service.events.say, "error"),
            )
        except RingstoneError as error:
            # Its files were good a moment ago. Guests are served by now and do not depend on it.
            self._service.events.say("error", f"The API is not served on {listening.where}: {error}")
            return []
        log.info("The API is also at %s, for bearers of a token.", listening.url)
        return [server]
