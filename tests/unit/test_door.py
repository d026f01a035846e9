"""Who is let in to an API over TCP: strangers get little time and few places, bearers of a token keep theirs."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from ringstone.api import door
from ringstone.api.door import Door
from ringstone.api.serving import TcpServer
from ringstone.lab.credentials import Credentials
from ringstone.listening import Listening

TOKEN = "t" * 32
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


class Serving:
    """A server over TCP, and what a client does to it."""

    def __init__(self, listening: Listening, **limits: int) -> None:
        self._listening = listening
        self._limits = limits

    def run(self, client: Callable[["Serving"], Awaitable[None]]) -> None:
        async def both() -> None:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.address = listener.getsockname()
            server = TcpServer(app, self._listening, listener, access_log=False, report=print)
            server._door = self.door = Door(listener, tls=self._listening.tls(), **self._limits)
            server.config.app._admit = self.door.admit  # type: ignore[union-attr]
            serving = asyncio.create_task(server.run_on_listener())
            try:
                await client(self)
            finally:
                server.stop()
                await serving

        asyncio.run(both())

    async def connect(self, tls: ssl.SSLContext | None = None) -> Streams:
        return await asyncio.open_connection(*self.address, ssl=tls)

    async def ask(self, streams: Streams, token: str = TOKEN) -> int:
        """The status of the answer; 0 when the connection is over."""
        reader, writer = streams
        writer.write(f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        try:
            answer = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            return 0
        return int(answer.split()[1])

    async def is_over(self, streams: Streams) -> bool:
        try:
            async with asyncio.timeout(10):
                return await streams[0].read(1) == b""
        except OSError:
            return True


@pytest.fixture
def listening(tmp_path: Path) -> Listening:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(f"{TOKEN}\n")
    return Listening("127.0.0.1", 1, token, None, None, "http://127.0.0.1:1")


def test_who_shows_no_token_in_time_is_turned_out(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "STRANGER_SECONDS", 0.3)

    async def client(serving: Serving) -> None:
        silent = await serving.connect()
        slow = await serving.connect()
        slow[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        known = await serving.connect()
        assert await serving.ask(known) == 204
        assert await serving.is_over(silent)
        assert await serving.is_over(slow)
        # Whoever has shown a token may keep the connection.
        await asyncio.sleep(0.5)
        assert await serving.ask(known) == 204
        for one in (silent, slow, known):
            one[1].close()

    Serving(listening).run(client)


def test_a_wrong_token_ends_its_connection(listening: Listening) -> None:
    async def client(serving: Serving) -> None:
        stranger = await serving.connect()
        assert await serving.ask(stranger, "x" * 32) == 401
        await stranger[0].readuntil(b"}")
        assert await serving.is_over(stranger)
        stranger[1].close()

    Serving(listening).run(client)


def test_any_number_of_strangers_keeps_nobody_out(listening: Listening) -> None:
    async def client(serving: Serving) -> None:
        known = [await serving.connect() for _ in range(3)]
        for one in known:
            assert await serving.ask(one) == 204
        strangers = [await serving.connect() for _ in range(40)]
        late = await serving.connect()
        assert await serving.ask(late) == 204
        # The first ones went, the last ones may still show a token, the known are there as before.
        assert await serving.is_over(strangers[0])
        assert await serving.ask(strangers[-1]) == 204
        for one in known:
            assert await serving.ask(one) == 204
        assert len(serving.door._strangers) <= 4
        for one in (*known, *strangers, late):
            one[1].close()

    Serving(listening, most_strangers=4).run(client)


def test_places_that_were_left_are_free(listening: Listening) -> None:
    async def client(serving: Serving) -> None:
        for _ in range(20):
            known = await serving.connect()
            assert await serving.ask(known) == 204
            known[1].close()
            await known[1].wait_closed()
            await asyncio.sleep(0.01)
        many = [await serving.connect() for _ in range(5)]
        assert [await serving.ask(one) for one in many] == [204] * 5
        beyond = await serving.connect()
        assert await serving.is_over(beyond)
        for one in (*many, beyond):
            one[1].close()

    Serving(listening, most=5).run(client)


def test_a_handshake_has_a_limit(
    listening: Listening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.3)
    credentials = Credentials(tmp_path / "credentials")
    own = credentials.certificate("127.0.0.1")
    secure = Listening("127.0.0.1", 1, listening.token_file, own.cert, own.key, "https://127.0.0.1:1")

    async def client(serving: Serving) -> None:
        silent = await serving.connect()
        nonsense = await serving.connect()
        nonsense[1].write(b"GET / HTTP/1.1\r\n\r\n")
        context = ssl.create_default_context(cafile=str(credentials.ca))
        known = await serving.connect(context)
        assert await serving.ask(known) == 204
        await nonsense[0].read()
        assert await serving.is_over(nonsense)
        assert await serving.is_over(silent)
        # Turned out in the middle of it.
        hasty = await serving.connect()
        strangers = [await serving.connect() for _ in range(4)]
        assert await serving.is_over(hasty)
        for one in (silent, nonsense, hasty, known, *strangers):
            one[1].close()

    Serving(secure, most_strangers=4).run(client)


def test_without_descriptors_it_tries_again(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "_PAUSE_SECONDS", 0.05)

    async def client(serving: Serving) -> None:
        loop = asyncio.get_running_loop()
        accept, left = loop.sock_accept, 3

        async def fails(listener: socket.socket) -> tuple[socket.socket, object]:
            nonlocal left
            if left:
                left -= 1
                raise OSError(24, "Too many open files")
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", fails)
        # The accept that is waiting is of before.
        for _ in range(2):
            known = await serving.connect()
            assert await serving.ask(known) == 204
            known[1].close()
        assert not left

    with caplog.at_level(logging.WARNING):
        Serving(listening).run(client)
    assert "Too many open files" in caplog.text
