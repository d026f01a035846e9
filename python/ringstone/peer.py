"""The other side of the control API: a request goes out and its answer comes back, or a sentence that says why not.

Nothing here knows what an answer means, and this file imports the standard library only, since a person waits for it:
ringstone.client is for who wants records. A server on the network is in ringstone.remote_peer.
"""

import json
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ringstone.errors import RingstoneError, StoppedError, UnreachableError, UntrustedError, error_of_code

# Long enough for a detach that drains a slow drive.
DEFAULT_TIMEOUT = 60.0

_ROOT = "/v1"
# For as long the process before may still answer in an upgrade, on a busy host.
_REPLACED_SECONDS = 2.0
_PAUSE_SECONDS = 0.02


class NoAnswer(Exception):
    """Why there is none, in the words of whoever knows."""


class NotSent(NoAnswer):
    """There is no connection, so nothing was done."""


class Late(NoAnswer):
    """Nothing came in time."""


class Ended(NoAnswer):
    """The other side ended the connection, or sent what is no HTTP."""


class Peer(ABC):
    """One server of the API. Use it in one thread."""

    def __init__(self, name: str, timeout: float) -> None:
        """`name` is how messages name it, with its article; `timeout` is in seconds."""
        self.name = name
        self._timeout = timeout

    def close(self) -> None:  # noqa: B027  # most have nothing to let go of
        """Let go of what is open to it."""

    def ask(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The answer of a success. Whatever else was answered is raised as an error of ringstone.errors;
        UnreachableError or UntrustedError when nothing was. What is None in `query` is left out.

        A process that has just been replaced says that it has stopped, and its successor is at the same address: what
        only reads is asked again."""
        asked = {name: value for name, value in (query or {}).items() if value is not None}
        deadline = time.monotonic() + _REPLACED_SECONDS
        while True:
            try:
                return self._ask_once(method, path, body, asked)
            except StoppedError:
                if method != "GET" or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _ask_once(
        self, method: str, path: str, body: Mapping[str, Any] | None, asked: Mapping[str, Any]
    ) -> bytes:
        try:
            status, content = self._exchange(method, path, body, asked)
        except NotSent as error:
            failure = self._unreachable(error)
            if isinstance(failure, UnreachableError):
                failure.sent = False
            raise failure from error
        except Late as error:
            raise UnreachableError(
                f"{self.sentence_name} did not answer within {self._timeout:g} seconds. "
                "Look at its log; guests are served all the same."
            ) from error
        except NoAnswer as error:
            raise self._unreachable(error) from error
        if not 200 <= status <= 299:
            raise self._failure(status, content)
        return content

    @property
    def sentence_name(self) -> str:
        return self.name[:1].upper() + self.name[1:]

    @abstractmethod
    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, Any]
    ) -> tuple[int, bytes]:
        """Status and content of the answer; NoAnswer. `path` begins behind the API's version."""

    @abstractmethod
    def _unreachable(self, error: NoAnswer) -> RingstoneError:
        """What to tell of it."""

    @abstractmethod
    def _stranger(self, status: int) -> RingstoneError:
        """For an answer with `status` that is none of Ringstone's."""

    def _failure(self, status: int, content: bytes) -> RingstoneError:
        """What the answer says, which is models.ErrorBody."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return self._stranger(status)
        code, message = (body.get("code"), body.get("message")) if isinstance(body, dict) else (None, None)
        if not isinstance(code, str) or not isinstance(message, str):
            return self._stranger(status)
        found = error_of_code(code, message)
        if isinstance(found, UntrustedError):
            # Of somebody behind it; this one has the request.
            found.sent = True
        return found


class _UnixConnection(HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("gateway", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class GatewayPeer(Peer):
    """The gateway of this host, at its control socket. Each request has a connection of its own: on a Unix socket it
    costs next to nothing, and one that is kept may be closed by the gateway just when it is used."""

    def __init__(self, socket: Path, timeout: float = DEFAULT_TIMEOUT) -> None:
        super().__init__(f"the gateway at {socket}", timeout)
        self.socket = socket

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, Any]
    ) -> tuple[int, bytes]:
        connection = _UnixConnection(self.socket, self._timeout)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise NotSent(str(error)) from error
            headers = {"Connection": "close"}
            content = None
            if body is not None:
                headers["Content-Type"] = "application/json"
                content = json.dumps(body).encode()
            connection.request(method, _target(path, query), body=content, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError as error:
            raise Late(str(error)) from error
        except RemoteDisconnected as error:
            raise Ended("Server disconnected without sending a response.") from error
        except HTTPException as error:
            raise Ended(str(error) or type(error).__name__) from error
        except OSError as error:
            raise NoAnswer(str(error)) from error
        finally:
            connection.close()

    def _unreachable(self, error: NoAnswer) -> RingstoneError:
        if not self.socket.exists():
            return UnreachableError(
                f"No gateway runs at {self.socket}: there is no such socket. Start it with `ringstone "
                "gateway` or `systemctl start ringstone-gateway`, or name its socket with --socket or "
                "RINGSTONE_SOCKET."
            )
        if "Errno 13" in str(error):
            return UnreachableError(
                f"{self.socket} may not be opened by this user; run the command as the gateway's user (root)."
            )
        return UnreachableError(
            f"The gateway at {self.socket} does not answer ({error}). Start it with `ringstone gateway` or "
            "`systemctl start ringstone-gateway`."
        )

    def _stranger(self, status: int) -> RingstoneError:
        return RingstoneError(
            f"What listens on {self.socket} answered {status} and is no Ringstone gateway; check --socket."
        )


def _target(path: str, query: Mapping[str, Any]) -> str:
    """As JSON writes true and false, which the API reads."""
    plain = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in query.items()}
    return f"{_ROOT}{path}?{urlencode(plain)}" if plain else f"{_ROOT}{path}"
