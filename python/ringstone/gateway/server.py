"""The control API's server: its socket, its signals, and the engine's events while it runs.

Importing this file takes longer than all the rest of a start, so the daemon does that when guests are served.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from ringstone.api.app import build_app
from ringstone.api.context import ApiContext
from ringstone.errors import ExistsError, error_of_os
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.engine import Engine, engine_version
from ringstone.gateway.events import EventLog
from ringstone.gateway.notify import sd_notify
from ringstone.gateway.service import Service
from ringstone.gateway.starts import STOP_SIGNALS
from ringstone.stats import StatsPage
from ringstone.version import version

log = logging.getLogger("ringstone.gateway")

# How long a request may still run once the gateway is told to stop.
_GRACE_SECONDS = 2


class _Server(uvicorn.Server):
    """Uvicorn without its ten wake-ups a second and without its signal handlers: the daemon has its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self._stop.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()


def _listen(path: Path) -> socket.socket:
    """The control API's socket. Nobody but the owner can connect, not even between bind and listen."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o600)
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
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ExistsError(f"Another process listens on {path}; stop it first or choose another --socket.")


def serve_api(config: GatewayConfig, service: Service, engine: Engine, started_ns: int) -> None:
    """Until SIGTERM or SIGINT. ExistsError when somebody else has the socket."""
    with _open_stats(config.stats_path) as stats:
        context = ApiContext(config, service, stats, engine_version(), started_ns)
        asyncio.run(_serve(config, context, engine, service.events))


def _open_stats(path: Path) -> StatsPage:
    try:
        return StatsPage(path)
    except OSError as error:
        raise error_of_os(error, f"mapping {path}", "Check the run directory's filesystem.") from error


async def _serve(config: GatewayConfig, context: ApiContext, engine: Engine, events: EventLog) -> None:
    listener = _listen(config.socket)
    server = _Server(
        uvicorn.Config(
            build_app(context),
            lifespan="off",
            log_config=None,
            access_log=config.log_level == "debug",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )

    def drain() -> None:
        for event in engine.drain_events():
            events.add(event)

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, server.stop)
    # The daemon held them back while nobody could do it in order.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
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
        sd_notify("READY=1")
        await server.serve(sockets=[listener])
    finally:
        sd_notify("STOPPING=1")
        loop.remove_reader(event_fd)
        drain()
        with contextlib.suppress(FileNotFoundError):
            config.socket.unlink()
