"""Where an API is served over TCP, and who may use it: the settings that gateway and manager share.

Imported by every start of a gateway, so only what is light is imported here.
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ringstone.errors import InvalidError, RingstoneError, error_of_os
from ringstone.loopback import is_loopback
from ringstone.private import read_private

if TYPE_CHECKING:
    import ssl

SETTINGS = ("listen", "tls_cert", "tls_key", "token_file", "advertise", "insecure")
Scope = Literal["look", "change"]
_SHORTEST_TOKEN = 16
# For whoever replaces a token file in several steps.
TOKEN_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Listening:
    """`address` is numeric. `cert` and `key`: PEM files; None is without TLS. `token_file` has a token a line, each of
    which lets its bearer do everything or, with the scope `look`, change nothing. `url`: how others reach it."""

    address: str
    port: int
    token_file: Path
    cert: Path | None
    key: Path | None
    url: str

    @property
    def where(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def sockaddr(self) -> tuple[str, int]:
        return self.address, self.port

    def check(self) -> None:
        """Errors of ringstone.errors when the files are not what they should be, before anything depends on it."""
        read_tokens(self.token_file)
        self.tls()

    def tls(self) -> "ssl.SSLContext | None":
        """For a server; None without TLS."""
        if self.cert is None or self.key is None:
            return None
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # The library does not say which of the two it could not read.
        _read(self.cert, "tls_cert")
        read_private(self.key, "tls_key")
        try:
            context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, OSError) as error:
            raise InvalidError(
                f"{self.cert} and {self.key} are no certificate and its key ({error}). Correct tls_cert and tls_key; "
                "both are PEM, the key without a passphrase."
            ) from error
        return context

    def bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self.sockaddr)
            listener.listen(128)
        except OSError as error:
            listener.close()
            step = "Correct listen to a free port of an address that this machine has."
            raise error_of_os(error, f"listening on {self.where}", step) from error
        return listener


class Tokens:
    """The tokens of a file, one a line, each with its scope; lines that are empty or begin with # are none. The file is
    read again when it has changed, so that tokens are changed without a restart: add the new one, change the clients,
    drop the old one. A file that has gone or has no good token leaves the tokens before in force for
    `TOKEN_GRACE_SECONDS`, in which whoever replaces it may finish; after that nobody is admitted. `report` is told of
    either by the first request or look() that finds it so."""

    def __init__(
        self,
        path: Path,
        *,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Errors of ringstone.errors when the file has no good token, or others may read it."""
        self._path = path
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._tokens = read_scopes(path)
        # When what is in force ends, as the file is no good.
        self._ends: float | None = None

    def _look(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode

    def look(self) -> None:
        """See what became of the file, though nobody asks: the seconds of grace begin when it went, not with the next
        request."""
        self._current()

    def _current(self) -> list[tuple[str, Scope]]:
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._read()
            if self._ends is not None and self._tokens and self._clock() >= self._ends:
                self._tokens = []
                self._report(f"No request is admitted over TCP any more: {self._path} has no good token.")
            return self._tokens

    def _read(self) -> None:
        try:
            self._tokens = read_scopes(self._path)
            self._ends = None
        except RingstoneError as error:
            if self._ends is None:
                self._ends = self._clock() + TOKEN_GRACE_SECONDS
                self._report(f"{error} In {TOKEN_GRACE_SECONDS:g} s nobody is admitted over TCP any more.")

    def admit(self, token: str) -> Scope | None:
        """What its bearer may do; None is nothing. In a time that tells nothing about the tokens."""
        # Only here: it brings OpenSSL along.
        import hmac

        given = token.encode()
        found = {scope for known, scope in self._current() if hmac.compare_digest(given, known.encode())}
        return "change" if "change" in found else "look" if found else None


def read_tokens(path: Path) -> list[str]:
    """Of a token file; the first is the one that its owner shows to others."""
    return [token for token, _ in read_scopes(path)]


def read_scopes(path: Path) -> list[tuple[str, Scope]]:
    """The tokens of a file in their order, with what each allows: TOKEN or `TOKEN change` everything, `TOKEN look` to
    look. InvalidError when a line is neither."""
    lines = [line.strip() for line in read_private(path, "the token file").splitlines()]
    tokens = [_scoped(path, line) for line in lines if line and not line.startswith("#")]
    if not tokens or any(len(token) < _SHORTEST_TOKEN or not token.isascii() for token, _ in tokens):
        raise InvalidError(
            f"{path} has no good token: one a line, at least {_SHORTEST_TOKEN} characters each. Make one with "
            f"`(umask 077; openssl rand -hex 32 > {path})`."
        )
    return tokens


def _scoped(path: Path, line: str) -> tuple[str, Scope]:
    token, *scopes = line.split()
    if scopes == ["look"]:
        return token, "look"
    if scopes in ([], ["change"]):
        return token, "change"
    # Not the line itself: this goes into logs.
    raise InvalidError(
        f"{path} has a token with {' '.join(scopes)!r} behind it, which is no scope; write look or change there, or "
        "nothing, which is change. Comments have lines of their own."
    )


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        if not isinstance(error, OSError):
            raise InvalidError(f"{path} is no text file; correct {setting}.") from error
        raise error_of_os(
            error, f"reading {path}", f"Correct {setting}, or the file's permissions."
        ) from error


def listening_of(settings: Mapping[str, Any], *, default: str | None = None) -> Listening | None:
    """From the settings of SETTINGS; None without `listen`. InvalidError names the one that is wrong."""
    listen = settings.get("listen") or default
    if listen is None:
        return None
    address, port = _address(listen)
    cert, key, token_file = (_path(settings, name) for name in ("tls_cert", "tls_key", "token_file"))
    if (cert is None) != (key is None):
        raise InvalidError("tls_cert and tls_key belong together; set both or none.")
    if token_file is None:
        raise InvalidError(
            f"listen is {listen!r} without token_file, so that everybody could do everything; set token_file."
        )
    if cert is None and not (is_loopback(address) or settings.get("insecure")):
        raise InvalidError(
            f"listen is {listen!r} without TLS, so that everybody on the way reads the token. Set tls_cert and "
            "tls_key; or insecure = true where nobody else is on that network."
        )
    url = settings.get("advertise") or _url(listen, address, port, secure=cert is not None)
    _check_url(url)
    return Listening(address, port, token_file, cert, key, url)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.inet_pton(family, bare)
        sound = bool(colon) and port.isdecimal() and 0 < int(port) < 65536
    except OSError:
        sound = False
    if not sound:
        raise InvalidError(
            f"listen is {listen!r}, not a numeric address with a port; write one such as 10.0.0.1:7480 or "
            "[fd00::1]:7480."
        )
    return bare, int(port)


def _url(listen: str, address: str, port: int, *, secure: bool) -> str:
    if address in ("0.0.0.0", "::"):
        raise InvalidError(
            f"listen is {listen!r}, which is no address that others could use; set advertise to this machine's URL, "
            f"such as https://host-a.example:{port}."
        )
    return f"{'https' if secure else 'http'}://{listen}"


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port and not parts.path
    except ValueError:
        sound = False
    if not sound:
        raise InvalidError(f"advertise is {url!r}, not a URL such as https://host-a.example:7480.")


def _path(settings: Mapping[str, Any], name: str) -> Path | None:
    value = settings.get(name)
    if value is None:
        return None
    if not value.startswith("/"):
        raise InvalidError(f"{name} is {value!r}, not an absolute path; begin it with /.")
    return Path(value)
