"""Hot upgrade, the control side: a gateway that goes on in another process while its guests' requests pause for
milliseconds and nobody reconnects.

The running gateway listens on <run dir>/handover.sock. `ringstone gateway --takeover` connects there. Each says
one line of JSON about itself; then the two engines speak (docs/formats/handover.md). Beside what the engines hand
over go the control side's own descriptors: the API's listening socket, so that no client is refused, the locks on
the state and run directories, so that no third gateway slips in between, and standard error, so that the log goes
on where it was.
"""

import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringstone.errors import (
    GoneError,
    NotFoundError,
    RingstoneError,
    StateError,
    error_of_os,
)
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.engine import Engine
from ringstone.gateway.service import Service
from ringstone.version import version

log = logging.getLogger("ringstone.gateway")

_LINE_BYTES = 64 * 1024
_LINE_SECONDS = 20
_CREDENTIALS = struct.Struct("3i")

API = "api"
API_TCP = "api-tcp"
STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class Upgrade:
    """`stall_ns`: from the first queue told to stop until the last ran again, in the new process. `at_ns` is
    CLOCK_REALTIME."""

    from_version: str
    to_version: str
    volumes: int
    stall_ns: int
    at_ns: int


def handover_socket(config: GatewayConfig) -> Path:
    return config.run_dir / "handover.sock"


# The running process's side.


class HandoverServer(threading.Thread):
    """Waits for a successor. `descriptors` are lent to it. When everything is handed over, `left` is set and
    `leave` called from this thread; nothing is served here any more then. `failed` is set when that went wrong
    after the word to go."""

    def __init__(
        self,
        config: GatewayConfig,
        engine: Engine,
        service: Service,
        descriptors: Mapping[str, int],
        leave: Callable[[], None],
    ) -> None:
        super().__init__(name="handover", daemon=True)
        self.left = False
        self.failed = False
        self.last_failure: str | None = None
        self._config = config
        self._engine = engine
        self._service = service
        self._events = service.events
        self._descriptors = dict(descriptors)
        self._leave = leave
        self._path = handover_socket(config)
        self._listener = _listen(self._path)

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed by stop()
            with connection:
                try:
                    self._serve(connection)
                except (RingstoneError, OSError) as error:
                    self._refused(error)
            if self.left:
                self._leave()
                return

    def _serve(self, connection: socket.socket) -> None:
        uid = _peer_uid(connection)
        if uid not in (0, os.geteuid()):
            raise StateError(
                f"user {uid} may not take over; run the upgrade as the gateway's own user or root"
            )
        greeting = _receive_line(connection)
        _send_line(
            connection,
            {
                "version": version(),
                "pid": os.getpid(),
                # How the new process reaches the service manager that started this one.
                "notify_socket": os.environ.get("NOTIFY_SOCKET", ""),
                "watchdog_usec": os.environ.get("WATCHDOG_USEC", ""),
            },
        )
        self._events.say(
            "info", f"Process {greeting.get('pid')} with release {greeting.get('version')} is to take over."
        )
        with self._service.frozen():
            try:
                report = self._engine.hand_over(
                    connection.fileno(), version=version(), extras=self._descriptors
                )
            except GoneError as error:
                # Neither of the two serves now: a fresh start finds in the in-flight regions where to go on.
                self.left = self.failed = True
                self._engine.abandon()
                self._events.say("error", f"The upgrade failed late: {error}")
                return
            self.left = True
            self._engine.abandon()
        self._events.say(
            "info",
            f"Handed {report.volumes} volumes over to release {report.version}; their requests paused for "
            f"{report.stall_ns / 1e6:.1f} ms, {report.drain_ns / 1e6:.1f} of them to come to rest.",
        )

    def _refused(self, error: Exception) -> None:
        self.last_failure = str(error)
        self._events.say("error", f"No upgrade: {error}. This gateway goes on as before.")

    def stop(self) -> None:
        """The socket's file goes only while it is ours."""
        if not self.left:
            self._path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


# The new process's side.


@dataclass(slots=True)
class Arrival:
    """What another process has handed over. The descriptors belong to whoever takes them out."""

    engine: Engine
    upgrade: Upgrade
    descriptors: dict[str, int]

    def listener(self, name: str) -> socket.socket | None:
        """API or API_TCP."""
        fd = self.descriptors.pop(name, None)
        return None if fd is None else socket.socket(fileno=fd)


def take_over(config: GatewayConfig) -> Arrival:
    """Go on with what the running gateway serves. NotFoundError when none runs; any other error means that the
    running one goes on."""
    path = handover_socket(config)
    with ExitStack() as stack:
        connection = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        )
        # Another one that hangs accepts nobody.
        connection.settimeout(_LINE_SECONDS)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotFoundError(
                f"No gateway that could be taken over listens on {path}; start one without --takeover."
            ) from error
        except OSError as error:
            raise error_of_os(
                error, f"connecting to {path}", "Run as the gateway's own user or root."
            ) from error
        _send_line(connection, {"version": version(), "pid": os.getpid()})
        other = _receive_line(connection)
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
            told = str(other.get(name.lower()) or "")
            if told and not os.environ.get(name):
                os.environ[name] = told
        connection.settimeout(None)
        engine, taken = Engine.take_over(
            connection.fileno(),
            config.cores,
            idle_us=config.idle_us,
            stats_path=config.stats_path,
            balance=config.balance,
            version=version(),
        )
    upgrade = Upgrade(taken.version, version(), taken.volumes, taken.stall_ns, time.time_ns())
    return Arrival(engine, upgrade, dict(taken.descriptors))


def take_over_stderr(arrival: Arrival) -> None:
    """The log goes on where the process before wrote it."""
    fd = arrival.descriptors.pop(STDERR, None)
    if fd is not None:
        os.dup2(fd, 2)
        os.close(fd)


def lent(
    config: GatewayConfig, locks: Mapping[Path, int], listener: socket.socket, tcp: socket.socket | None
) -> dict[str, int]:
    """The control side's descriptors, by the names under which they travel."""
    names = {path: f"lock:{name}" for path, name in zip(config.locks, ("state", "run"), strict=True)}
    lent = {names[path]: fd for path, fd in locks.items()} | {API: listener.fileno(), STDERR: 2}
    return lent if tcp is None else lent | {API_TCP: tcp.fileno()}


def adopt_locks(config: GatewayConfig, arrival: Arrival) -> dict[Path, int]:
    """The locks on this gateway's directories, which came over locked; they say from now on that they are ours."""
    locks: dict[Path, int] = {}
    for path, name in zip(config.locks, ("state", "run"), strict=True):
        fd = arrival.descriptors.pop(f"lock:{name}", None)
        if fd is None:
            continue
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        locks[path] = fd
    return locks


def _listen(path: Path) -> socket.socket:
    # The lock on the run directory is ours, so whatever is there was left behind, or handed over with the rest.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The socket's file takes this mode when it is bound: there is no moment at which others could connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(4)
    except OSError as error:
        listener.close()
        raise error_of_os(error, f"listening on {path}", "Check the run directory.") from error
    return listener


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid


def _send_line(connection: socket.socket, value: Mapping[str, Any]) -> None:
    connection.settimeout(_LINE_SECONDS)
    connection.sendall(json.dumps(dict(value)).encode() + b"\n")


def _receive_line(connection: socket.socket) -> dict[str, Any]:
    """Byte by byte, as what follows the line is the engine's."""
    connection.settimeout(_LINE_SECONDS)
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) == _LINE_BYTES:
            raise StateError("the other gateway ended the conversation before it began")
        line += byte
    try:
        value = json.loads(line)
    except ValueError as error:
        raise StateError(f"the other gateway said {bytes(line[:80])!r}, which is no greeting") from error
    if not isinstance(value, dict):
        raise StateError(f"the other gateway said {bytes(line[:80])!r}, which is no greeting")
    return value
