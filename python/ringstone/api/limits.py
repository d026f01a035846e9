"""What an API does at once, and for how long: so much that neither bodies without an end nor calls that hang with their
storage take what the other calls need."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringstone.api.answers import answer
from ringstone.api.auth import scope_needed
from ringstone.api.health import HEALTH_PATH
from ringstone.errors import BusyError, InvalidError, RingstoneError
from ringstone.listening import Scope as Kind

# At once. Looks are quick, unless their storage hangs; changes may last.
LOOKS = 32
CHANGES = 64
# How long a look may last; what it found later is nobody's. A change is answered when it is done.
LOOK_SECONDS = 30.0
# The longest body that any call has is far below.
BODY_BYTES = 1 << 20
BODY_SECONDS = 10.0


class Limits:
    """Lets a request through to `app` while there is room for one more of its kind. The question for the health always
    has room."""

    def __init__(
        self, app: ASGIApp, *, looks: int = LOOKS, changes: int = CHANGES, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self._app = app
        self._most: dict[Kind, int] = {"look": looks, "change": changes}
        self._look_seconds = look_seconds
        self._running: dict[Kind, set[asyncio.Task[None]]] = {"look": set(), "change": set()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # No lifespan is run and no endpoint is a websocket.
            return
        if scope["path"] == HEALTH_PATH:
            await self._app(scope, receive, send)
            return
        kind = scope_needed(scope["method"])
        running = self._running[kind]
        if len(running) >= self._most[kind]:
            message = f"The server has {len(running)} calls of this kind going on already"
            await _refuse(send, BusyError(f"{message}. {_NEXT_STEP}"), 503)
            return
        call = _Call(self._app, scope, receive, send)
        task = asyncio.create_task(call.run())
        running.add(task)
        # Not before the thread that it waits for has ended, though nobody waits for the answer any more.
        task.add_done_callback(running.discard)
        done, _ = await asyncio.wait({task}, timeout=self._look_seconds if kind == "look" else None)
        if done:
            task.result()
        elif not await call.give_up(self._look_seconds):
            await task


_NEXT_STEP = "Try again; when it stays so, storage hangs: `ringstone status` says which."


class _Call:
    """One request, with its body whole before the application sees it."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body: bytes | None = b""
        self._answered = False
        self._given_up = False

    async def run(self) -> None:
        try:
            self._body = await self._read()
        except _RefusedError as error:
            # What is still to come of the body is not waited for.
            await _refuse(self._send, InvalidError(str(error)), error.status, close=True)
            return
        if self._body is not None:
            await self._app(self._scope, self._replay, self._answer)

    async def give_up(self, seconds: float) -> bool:
        """Answer in the application's place; False when it has begun to."""
        if self._answered:
            return False
        self._given_up = True
        message = f"{self._scope['method']} {self._scope['path']} has not come back for {seconds:g} s"
        await _refuse(self._send, BusyError(f"{message}. {_NEXT_STEP}"), 503)
        return True

    async def _read(self) -> bytes | None:
        """None when the client has gone."""
        told = Headers(scope=self._scope).get("content-length", "")
        if told.isdecimal() and int(told) > BODY_BYTES:
            raise _RefusedError(413)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > BODY_BYTES:
                        raise _RefusedError(413)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise _RefusedError(408) from None

    async def _replay(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _answer(self, message: Message) -> None:
        if not self._given_up:
            self._answered = True
            await self._send(message)


class _RefusedError(Exception):
    """`status`: of HTTP."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"The request's body is longer than {BODY_BYTES} bytes, more than any call of this API has."
            if status == 413
            else f"The request's body did not come within {BODY_SECONDS:g} s. Send it at once."
        )
        self.status = status


async def _refuse(send: Send, error: RingstoneError, status: int, *, close: bool = False) -> None:
    refusal = answer(error, status)
    if close:
        refusal.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": refusal.status_code, "headers": refusal.raw_headers})
    await send({"type": "http.response.body", "body": refusal.body})
