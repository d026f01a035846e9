"""A real `ringstone gateway` in a directory of its own, as an operator would run it."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from ringstone import models
from ringstone.client import GatewayClient
from ringstone.errors import RingstoneError

# The command line, as this Python has it installed.
RINGSTONE = (sys.executable, "-m", "ringstone")

# Generous, for a busy machine; they end a test that would otherwise hang.
_START_SECONDS = 60
_STOP_SECONDS = 60
_COMMAND_SECONDS = 60
_EVENT_SECONDS = 60


class GatewayFailedError(Exception):
    """The process did not do what the test told it to; the message ends with its log."""


class Successor:
    """A gateway that another process started, with the part of Popen that the tests need. Its exit status is
    its parent's to know; here it is 0."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._fd = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self._fd], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired("the successor", timeout or 0)
            os.close(self._fd)
            self.returncode = 0
        return self.returncode


def send_until_it_ends(process: "subprocess.Popen[bytes] | Successor", number: signal.Signals) -> None:
    """A signal again and again; subprocess.TimeoutExpired when that takes too long."""
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        try:
            process.wait(0.0005)
            return
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise
            process.send_signal(number)


# Bytes of a store pool's file.
STORE_SIZE = 512 << 20


class GatewayProcess:
    """One gateway under test: state, run directory, pools and log below `root`, memory pools below `memory`.

    Use it as a context manager: leaving it stops the process by its id and removes everything.
    """

    def __init__(
        self,
        *arguments: str,
        cores: Sequence[int] | None = None,
        test_pools: bool = False,
        watchdog_ms: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`arguments` are further flags of `ringstone gateway`; `cores` default to the last CPU; `watchdog_ms`: how
        long the service manager lets it be silent; `environment`: what start() adds to this process's own."""
        # Short, as the path of a Unix socket may have 107 bytes only.
        self.root = Path(tempfile.mkdtemp(prefix="ringstone-", dir="/tmp"))
        self.memory = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
        self.state_dir = self.root / "state"
        self.run_dir = self.root / "run"
        self.socket = self.run_dir / "gateway.sock"
        self.stats_path = self.run_dir / "stats"
        self.log_path = self.root / "gateway.log"
        self.cores = list(cores) if cores is not None else [max(os.sched_getaffinity(0))]
        self._arguments = [*arguments, *(["--allow-test-pools"] if test_pools else [])]
        self._environment = dict(environment or {})
        if watchdog_ms is not None:
            self._environment["WATCHDOG_USEC"] = str(watchdog_ms * 1000)
        self._process: subprocess.Popen[bytes] | Successor | None = None
        # As a service manager has it: there for as long as the process.
        self._manager: socket.socket | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the gateway has not been started"
        return self._process.pid

    def command(self) -> list[str]:
        """What start() runs."""
        return [
            *(*RINGSTONE, "gateway"),
            *("--cores", ",".join(map(str, self.cores))),
            *("--state-dir", str(self.state_dir), "--run-dir", str(self.run_dir)),
            *self._arguments,
        ]

    def environment(self, **extra: str) -> dict[str, str]:
        """This process's own, without what would lead a command to another gateway or a service manager."""
        dropped = ("RINGSTONE_SOCKET", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM")
        return {name: value for name, value in os.environ.items() if name not in dropped} | extra

    def start(self) -> Self:
        """Returns when the gateway says READY=1, as to a service manager; GatewayFailedError when it ends
        first."""
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def launch(self) -> None:
        """Begin to start it. For tests that do something to it on the way; wait_ready() does the rest."""
        assert self._process is None, "the gateway is running already"
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = self.root / "notify.sock"
        path.unlink(missing_ok=True)
        manager.bind(str(path))
        try:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    self.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment(NOTIFY_SOCKET=str(path), **self._environment),
                )
        except BaseException:
            manager.close()
            raise
        self._manager = manager

    def wait_ready(self) -> None:
        """Until a gateway that was launched, or that a supervisor started again, says READY=1."""
        process, notify = self._process, self._manager
        assert process is not None, "the gateway has not been started"
        assert notify is not None
        ended = os.pidfd_open(process.pid)
        deadline = time.monotonic() + _START_SECONDS
        try:
            while True:
                rest = max(0.0, deadline - time.monotonic())
                ready, _, _ = select.select([notify.fileno(), ended], [], [], rest)
                if notify.fileno() not in ready:
                    break
                told = notify.recv(256)
                if told == b"READY=1":
                    return
                if not told.startswith((b"EXTEND_TIMEOUT_USEC=", b"WATCHDOG=1")):
                    raise GatewayFailedError(f"The gateway said {told!r} instead of READY=1.\n{self.log()}")
        finally:
            os.close(ended)
        what = f"ended with {process.wait()}" if ready else f"was not ready in {_START_SECONDS} s"
        raise GatewayFailedError(f"The gateway {what}.\n{self.log()}")

    def wait_sign_of_life(self) -> None:
        """Until the service manager is told WATCHDOG=1 once more."""
        assert self._manager is not None
        ready, _, _ = select.select([self._manager], [], [], _EVENT_SECONDS)
        told = self._manager.recv(256) if ready else b"nothing"
        if told != b"WATCHDOG=1":
            raise GatewayFailedError(f"The gateway said {told!r} instead of WATCHDOG=1.\n{self.log()}")

    def run_to_end(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the same command once more with further `arguments`, where it must end by itself."""
        return subprocess.run(
            [*self.command(), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
            env=self.environment(),
        )

    def stop(self, number: signal.Signals = signal.SIGTERM, *, insist: bool = False) -> None:
        """As a service manager does: by signal, and GatewayFailedError unless it ends cleanly. To `insist` is to send
        it again and again until then."""
        with self._ending() as process:
            process.send_signal(number)
            try:
                if insist:
                    send_until_it_ends(process, number)
                code = process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired as error:
                process.kill()
                process.wait()
                raise GatewayFailedError(
                    f"The gateway did not stop in {_STOP_SECONDS} s.\n{self.log()}"
                ) from error
        if code != 0:
            raise GatewayFailedError(f"The gateway ended with {code}.\n{self.log()}")

    def kill(self) -> None:
        """As a crash: SIGKILL."""
        with self._ending() as process:
            process.kill()
            process.wait()

    @contextmanager
    def _ending(self) -> Iterator[subprocess.Popen[bytes] | Successor]:
        process, manager = self._process, self._manager
        assert process is not None, "the gateway is not running"
        assert manager is not None
        self._process = self._manager = None
        with manager:
            yield process

    def upgrade(self, *, environment: Mapping[str, str] | None = None) -> Any:
        """`ringstone gateway upgrade`; its report. The new process is the one under test from then on."""
        self._listen()
        done = subprocess.run(
            [*RINGSTONE, "--socket", str(self.socket), "gateway", "upgrade", "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            env=self.environment(**(environment or {})),
        )
        if done.returncode != 0:
            raise GatewayFailedError(f"The upgrade ended with {done.returncode}: {done.stderr}")
        with self.client() as client:
            self.follow(client.info().pid)
        return json.loads(done.stdout)

    def _listen(self) -> None:
        """Take what the gateway has said so far, as a service manager does all the time: a gateway waits for one whose
        queue (ten messages by default) is full."""
        assert self._manager is not None
        while select.select([self._manager], [], [], 0)[0]:
            self._manager.recv(256)

    def follow(self, pid: int) -> None:
        """Process `pid` has taken over: it is the one under test from now on. The former one must end by itself,
        with 0."""
        former = self._process
        assert former is not None
        self._process = Successor(pid)
        if former.wait(_STOP_SECONDS) != 0:
            raise GatewayFailedError(f"The former gateway ended with {former.returncode}.\n{self.log()}")

    def kill_beside(self, successor: "subprocess.Popen[bytes]") -> bool:
        """SIGKILL while `successor` is about to take its place. Whether that serves, and is under test from now on;
        otherwise it has ended, and none runs."""
        former = self._process
        assert former is not None
        former.kill()
        former.wait()
        deadline = time.monotonic() + _START_SECONDS
        while successor.poll() is None:
            with suppress(RingstoneError), self.client() as client:
                # The HTTP client leaves sockets behind that were refused.
                if self._listens() and client.info().pid == successor.pid:
                    self._process = Successor(successor.pid)
                    return True
            if time.monotonic() > deadline:
                raise GatewayFailedError(f"The successor neither serves nor ends.\n{self.log()}")
            time.sleep(0.02)
        with self._ending():
            return False

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def ends(self, *, within_s: float) -> bool:
        """Whether the gateway ends without being told to."""
        assert self._process is not None
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        with self._ending():
            return True

    def restart(self) -> None:
        self.stop()
        self.start()

    def forget_starts(self) -> None:
        """As if it had served for long since it last died: it does not slow its next start down. For tests that
        kill it over and over."""
        (self.run_dir / "starts").unlink(missing_ok=True)

    def client(self) -> GatewayClient:
        return GatewayClient(self.socket)

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a `ringstone` command against this gateway; with `check` it must end with 0."""
        done = subprocess.run(
            [*RINGSTONE, "--socket", str(self.socket), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            env=self.environment(),
        )
        if check and done.returncode != 0:
            raise GatewayFailedError(
                f"ringstone {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
            )
        return done

    def cli_json(self, *arguments: str) -> Any:
        """What a command prints with --json."""
        return json.loads(self.cli(*arguments, "--json").stdout)

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def wait_for(self, what: str, condition: Callable[[GatewayClient], bool]) -> None:
        """Ask the API until `condition` holds; GatewayFailedError names `what` did not come. For what the
        gateway does by itself and nobody is told of."""
        deadline = time.monotonic() + _EVENT_SECONDS
        with self.client() as client:
            while not condition(client):
                if time.monotonic() > deadline:
                    raise GatewayFailedError(f"Waited {_EVENT_SECONDS} s for {what}.\n{self.log()}")
                time.sleep(0.02)

    def make_pool(self, kind: str, name: str = "pool", *, capacity: int | None = None) -> models.Pool:
        """A pool of `kind` below this gateway's directories; `sealed` is a store with a key."""
        path = str(self.memory / name) if kind == "memory" else None
        store = models.StoreOptions(size=STORE_SIZE) if kind == "store" else None
        if kind == "sealed":
            store = models.StoreOptions(size=STORE_SIZE, key_file=str(self._key()))
        type_ = "store" if kind == "sealed" else kind
        asked = models.PoolCreate(name=name, type=type_, path=path, capacity=capacity, store=store)
        with self.client() as client:
            return client.create_pool(asked)

    def _key(self) -> Path:
        path = self.root / "key"
        path.write_bytes(os.urandom(32))
        path.chmod(0o600)
        return path

    def serve(
        self,
        volume: str,
        *,
        kind: str = "memory",
        size: int = 64 << 20,
        block_size: int = 512,
        queues: int | None = None,
        read_only: bool = False,
    ) -> models.Attachment:
        """Make a volume in a pool of `kind` (made when there is none yet) and attach it. One of kind `sealed` is
        encrypted and has checksums."""
        with self.client() as client:
            if kind not in {pool.name for pool in client.pools()}:
                self.make_pool(kind, kind)
            sealed = kind == "sealed"
            client.create_volume(
                volume, pool=kind, size=size, block_size=block_size, integrity=sealed, encryption=sealed
            )
            return client.attach(volume, queues=queues, read_only=read_only)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process is not None:
                self.stop()
        finally:
            shutil.rmtree(self.root)
            shutil.rmtree(self.memory)


@pytest.fixture
def gateway() -> Iterator[GatewayProcess]:
    """A running gateway, for one test."""
    with GatewayProcess() as process:
        yield process.start()
