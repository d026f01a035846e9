"""Who is let in to an API over TCP. Whoever reaches the address may connect, so those that have shown no token yet,
*strangers*, get little: few of the descriptors, which guests' frontends need, and little time."""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger("ringstone.api")

# From the connection to the end of a request's header with a token that is good.
STRANGER_SECONDS = 10.0
# A TLS handshake, which is a part of that.
HANDSHAKE_SECONDS = 5.0
# At once, and as a part of the descriptors that the process may have.
_MOST_STRANGERS = 64
_STRANGERS_PART = 8
_MOST = 512
_PART = 4
# After an accept that failed, as without a descriptor the next one would at once fail too.
_PAUSE_SECONDS = 0.2

Address = tuple[str, int]


@dataclass(slots=True, eq=False)
class _Visitor:
    """`transport` is there once TLS, if there is any, has been agreed on."""

    socket: socket.socket
    transport: asyncio.BaseTransport | None = None
    deadline: asyncio.TimerHandle | None = None

    @property
    def gone(self) -> bool:
        return self.socket.fileno() < 0

    def turn_out(self) -> None:
        if isinstance(self.transport, asyncio.WriteTransport):
            self.transport.abort()
            return
        # In the handshake, which ends with an error when the connection does.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Door:
    """Takes connections on `listener`, which is its own, and gives each to what `protocol` makes. When there are too
    many strangers, the one that has been there longest goes: whoever has a token shows it at once."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        tls: ssl.SSLContext | None,
        most_strangers: int | None = None,
        most: int | None = None,
    ) -> None:
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._listener = listener
        self._tls = tls
        self._most_strangers = most_strangers or min(_MOST_STRANGERS, max(1, descriptors // _STRANGERS_PART))
        self._most = most or min(_MOST, max(2, descriptors // _PART))
        # In the order in which they came.
        self._strangers: dict[Address, _Visitor] = {}
        self._known: dict[Address, _Visitor] = {}
        self._arriving: set[asyncio.Task[None]] = set()

    def admit(self, address: Address | None) -> None:
        """The other end of a connection has shown a token that is good."""
        visitor = self._strangers.pop(address, None) if address else None
        if address is None or visitor is None:
            return
        if visitor.deadline is not None:
            visitor.deadline.cancel()
        self._known[address] = visitor

    async def run(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Until it is cancelled; connections that are there go on."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        try:
            while True:
                try:
                    visitor, address = await loop.sock_accept(self._listener)
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    log.warning("No connection is taken over TCP for the moment: %s.", error)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                self._let_in(visitor, address[:2], protocol)
        finally:
            self._listener.close()
            for task in self._arriving:
                task.cancel()

    def _let_in(
        self, connection: socket.socket, address: Address, protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        for visitors in (self._strangers, self._known):
            for one in [one for one, visitor in visitors.items() if visitor.gone]:
                self._forget(visitors, one)
        if len(self._strangers) >= self._most_strangers:
            self._turn_out(next(iter(self._strangers)))
        if len(self._strangers) + len(self._known) >= self._most:
            # Strangers are never so many: those that have a token have to do with less.
            connection.close()
            return
        loop = asyncio.get_running_loop()
        visitor = self._strangers[address] = _Visitor(connection)
        visitor.deadline = loop.call_later(STRANGER_SECONDS, self._turn_out, address)
        task = loop.create_task(self._serve(visitor, protocol))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    def _turn_out(self, address: Address) -> None:
        visitor = self._forget(self._strangers, address)
        if visitor is not None:
            visitor.turn_out()

    def _forget(self, visitors: dict[Address, _Visitor], address: Address) -> _Visitor | None:
        visitor = visitors.pop(address, None)
        if visitor is not None and visitor.deadline is not None:
            visitor.deadline.cancel()
        return visitor

    async def _serve(self, visitor: _Visitor, protocol: Callable[[], asyncio.Protocol]) -> None:
        try:
            visitor.transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                protocol,
                visitor.socket,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None,
            )
        except OSError as error:
            # No TLS, too slow, or gone: nobody of ours.
            log.debug("A connection came to nothing: %s.", error)
            visitor.socket.close()
