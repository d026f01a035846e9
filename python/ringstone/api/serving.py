"""HTTP servers of one process: the same application on a Unix socket, and over TCP for the bearers of a token."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from ringstone.api.auth import TokenRequired
from ringstone.listening import Listening, Tokens

# How long a request may still run once the process is told to stop.
_GRACE_SECONDS = 2
# Between two looks at the token file.
_LOOK_SECONDS = 1.0


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


class TcpServer(Server):
    """For who has a token of `listening`, with TLS where that has certificates."""

    def __init__(
        self,
        app: ASGIApp,
        listening: Listening,
        listener: socket.socket,
        *,
        access_log: bool,
        report: Callable[[str], None],
    ) -> None:
        """`report` is told when the token file is no good any more. Errors of ringstone.errors when one of the files is
        no good now."""
        self._tokens = Tokens(listening.token_file, report=report)
        super().__init__(TokenRequired(app, self._tokens), listener, access_log=access_log)
        self.config.load()
        # Made by us, as uvicorn's own would take what is older than TLS 1.2 for good.
        self.config.ssl = listening.tls()

    async def run_on_listener(self) -> None:
        looking = asyncio.create_task(self._look_at_tokens())
        try:
            await super().run_on_listener()
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking

    async def _look_at_tokens(self) -> None:
        while True:
            # The file may lie on storage that is slow.
            await asyncio.to_thread(self._tokens.look)
            await asyncio.sleep(_LOOK_SECONDS)
