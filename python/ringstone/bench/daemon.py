"""A whole gateway, as an operator has it: started, killed and started again by this process, or upgraded."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ringstone import models
from ringstone.bench.process import last_line
from ringstone.client import GatewayClient
from ringstone.errors import RingstoneError, StateError

_WAIT_SECONDS = 60.0
_LOOK_SECONDS = 0.001
_RINGSTONE = (sys.executable, "-m", "ringstone")
# What would lead the process to another gateway or service manager.
_NOT_INHERITED = ("RINGSTONE_SOCKET", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM")
_HANDED_OVER = re.compile(r"paused for ([\d.]+) ms, ([\d.]+) of them to (?:come to rest|finish)")


@dataclass(frozen=True, slots=True)
class Start:
    """One start; CLOCK_MONOTONIC nanoseconds. `listening` is None where no socket was watched."""

    began: int
    ready: int
    listening: int | None = None


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What the two processes say of an upgrade, in milliseconds; `command_ms` is how long the command took."""

    stall_ms: float
    drain_ms: float
    command_ms: float


class GatewayDaemon:
    """`run` takes what is in /run otherwise, sockets and stats page; `state` the database. Leaving it stops the
    process."""

    def __init__(self, run: Path, state: Path, cores: Sequence[int], *flags: str) -> None:
        self._run, self._state, self._cores, self._flags = run, state, list(cores), flags
        self._log = run / "gateway.log"
        self._child: subprocess.Popen[bytes] | None = None
        # Of the process that serves, which after an upgrade is not our child.
        self._pidfd: int | None = None
        self._manager: socket.socket | None = None

    @property
    def stats_path(self) -> Path:
        return self._run / "stats"

    @property
    def socket(self) -> Path:
        """Of its API."""
        return self._run / "gateway.sock"

    def client(self) -> GatewayClient:
        return GatewayClient(self.socket)

    def start(self, *, watch: Path | None = None) -> Start:
        """Returns at READY=1. `watch`: a volume's socket, to see when the new process listens there."""
        assert self._child is None, "it runs already"
        path = self._run / "notify.sock"
        path.unlink(missing_ok=True)
        # As a service manager has it: there for as long as the process.
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(path))
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        before = _identity(watch)
        began = time.monotonic_ns()
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [
                    *(*_RINGSTONE, "gateway"),
                    *("--cores", ",".join(map(str, self._cores))),
                    *("--state-dir", str(self._state), "--run-dir", str(self._run)),
                    *self._flags,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"NOTIFY_SOCKET": str(path)},
            )
        self._pidfd = os.pidfd_open(self._child.pid)
        listening = self._await_socket(watch, before) if watch is not None else None
        self._await_ready()
        return Start(began, time.monotonic_ns(), listening)

    def _await_socket(self, path: Path, before: tuple[int, int] | None) -> int:
        """When another socket is bound to `path` than `before`."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while _identity(path) in (None, before):
            self._must_run(deadline)
            time.sleep(_LOOK_SECONDS)
        return time.monotonic_ns()

    def _must_run(self, deadline: float) -> None:
        assert self._child is not None
        if self._child.poll() is not None or time.monotonic() > deadline:
            raise RingstoneError(
                f"The gateway did not start: {last_line(self._log.read_text(errors='replace'))}"
            )

    def _await_ready(self) -> None:
        assert self._manager is not None
        assert self._pidfd is not None
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            readable, _, _ = select.select([self._manager.fileno(), self._pidfd], [], [], 1.0)
            if self._manager.fileno() in readable and self._manager.recv(256) == b"READY=1":
                return
            if self._manager.fileno() not in readable:
                self._must_run(deadline)

    def _read_notifications(self) -> None:
        """What nobody reads would fill the socket, and the gateway would wait."""
        assert self._manager is not None
        while select.select([self._manager], [], [], 0)[0]:
            self._manager.recv(256)

    def kill(self) -> int:
        """As a crash. CLOCK_MONOTONIC of the signal."""
        assert self._pidfd is not None
        at = time.monotonic_ns()
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._ended()
        return at

    def upgrade(self) -> Upgraded:
        """By the command, as an operator does it."""
        began, seen = time.monotonic(), self._log.stat().st_size
        done = subprocess.run(
            [*_RINGSTONE, "--socket", str(self.socket), "gateway", "upgrade", "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * _WAIT_SECONDS,
            check=False,
        )
        took = time.monotonic() - began
        if done.returncode:
            raise StateError(f"The upgrade ended with status {done.returncode}: {last_line(done.stderr)}")
        with self.client() as client:
            pid = client.info().pid
        former, self._pidfd = self._pidfd, os.pidfd_open(pid)
        assert former is not None
        _await_end(former)
        if self._child is not None:
            self._child.wait()
        self._read_notifications()
        report = models.Upgrade.model_validate(json.loads(done.stdout))
        with self._log.open("rb") as log:
            log.seek(seen)
            drain = drain_ms(log.read().decode(errors="replace"))
        return Upgraded(report.stall_ms, drain, took * 1000)

    def stop(self) -> None:
        assert self._pidfd is not None
        # One that had ended before is only cleared away; who started it has been told.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        self._ended()

    def _ended(self) -> None:
        assert self._pidfd is not None
        assert self._manager is not None
        pidfd, self._pidfd = self._pidfd, None
        _await_end(pidfd)
        if self._child is not None:
            self._child.wait()
        self._child = None
        self._manager.close()

    def serve(self, volume: str, pool: str, *, size: int, queues: int) -> Path:
        """Make a volume in a pool and attach it; the socket it listens on."""
        with self.client() as client:
            client.create_volume(volume, pool=pool, size=size)
            return Path(client.attach(volume, queues=queues).socket)

    def make_pool(self, name: str, kind: str, path: Path) -> None:
        path.mkdir(exist_ok=True)
        with self.client() as client:
            client.create_pool(models.PoolCreate(name=name, type=kind, path=str(path)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pidfd is not None:
            self.stop()


def drain_ms(log: str) -> float:
    """The part of the stall that the former process took to come to rest, from its log."""
    found = _HANDED_OVER.findall(log)
    if not found:
        raise StateError("The log of the gateway does not tell of the handover. See the log level.")
    return float(found[-1][1])


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Of whatever is at `path`; a socket that is bound anew has another."""
    try:
        status = path.stat() if path is not None else None
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_ctime_ns) if status is not None else None


def _await_end(pidfd: int) -> None:
    ended, _, _ = select.select([pidfd], [], [], _WAIT_SECONDS)
    if not ended:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    if not ended:
        raise StateError(f"A gateway did not end in {_WAIT_SECONDS:g} s and was killed. See its log.")
