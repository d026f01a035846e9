"""HTTP servers of one process: the same application on a Unix socket, and over TCP for the bearers of a token."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from ringstone.api.auth import TokenRequired
from ringstone.listening import Listening, Tokens

# How long a request may still run once the process is told to stop.
_GRACE_SECONDS = 2


class Server(uvicorn.Server):
    """Uvicorn without its ten wake-ups a second and without its signal handlers: our processes have their own."""

    def __init__(self, app: ASGIApp, listener: socket.socket, *, access_log: bool) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=access_log,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._listener = listener
        self._stop = asyncio.Event()

    async def main_loop(self) -> None:
        await self._stop.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_on_listener(self) -> None:
        """Until stop()."""
        await self.serve(sockets=[self._listener])

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()


def tcp_server(
    app: ASGIApp,
    listening: Listening,
    listener: socket.socket,
    *,
    access_log: bool,
    report: Callable[[str], None],
) -> Server:
    """For who has a token of `listening`, with TLS where that has certificates. `report` is told when the token file is
    no good any more."""
    tokens = Tokens(listening.token_file, report=report)
    server = Server(TokenRequired(app, tokens), listener, access_log=access_log)
    server.config.load()
    # Made by us, as uvicorn's own would take what is older than TLS 1.2 for good.
    server.config.ssl = listening.tls()
    return server
