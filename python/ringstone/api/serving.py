"""HTTP servers of one process: the same application on a Unix socket, and over TCP for the bearers of a token. Each has
limits of its own, so that whoever is at one of them leaves the other alone."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio.to_thread
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringstone.api.auth import TokenRequired
from ringstone.api.door import Door
from ringstone.api.limits import CHANGES, LOOKS, Limits
from ringstone.listening import Listening, Tokens

log = logging.getLogger("ringstone.api")

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
                http=H11Protocol,
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
        # A thread for each call that the limits let through.
        anyio.to_thread.current_default_thread_limiter().total_tokens += LOOKS + CHANGES
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
        # Made by us, as uvicorn's own would take what is older than TLS 1.2 for good.
        self._door = Door(listener, tls=listening.tls())
        asking = TokenRequired(Limits(app), self._tokens, admit=self._door.admit)
        super().__init__(asking, listener, access_log=access_log)

    async def run_on_listener(self) -> None:
        # Uvicorn itself would let everybody in.
        await self.serve(sockets=[])

    async def main_loop(self) -> None:
        tasks = [
            asyncio.create_task(self._door.run(self._protocol)),
            asyncio.create_task(self._look_at_tokens()),
        ]
        for task in tasks:
            task.add_done_callback(_say_why_it_ended)
        try:
            await super().main_loop()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _protocol(self) -> asyncio.Protocol:
        return H11Protocol(self.config, self.server_state, self.lifespan.state)

    async def _look_at_tokens(self) -> None:
        while True:
            # The file may lie on storage that is slow.
            await asyncio.to_thread(self._tokens.look)
            await asyncio.sleep(_LOOK_SECONDS)


def _say_why_it_ended(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("The API over TCP serves nobody any more", exc_info=error)
