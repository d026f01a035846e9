"""One daemon of the lab: started with a log of its own, stopped, continued and ended by its process id."""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ringstone.errors import RingstoneError, UnsupportedError

_TAIL_LINES = 20
_POLL_SECONDS = 0.05
# A killed process may have to wait for I/O of its own first.
_KILL_SECONDS = 60.0


class LabError(RingstoneError):
    """Something in the lab did not start, or did not come about in time; the message ends with the log."""


class Daemon:
    """A process that runs until it is told to end. `name` is for messages, and that of its log in `logs`.

    It ends with the thread that starts it (the main one, that is: with this process), however that ends.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        logs: Path,
        environment: Mapping[str, str | None] | None = None,
        package: str | None = None,
        directory: Path | None = None,
    ) -> None:
        """`environment` is added to this process's own, None taking a variable away; `package`: Debian's, to name when
        the program is missing; `directory`: where it works, if not where this process does."""
        self.name = name
        self.log = logs / f"{name}.log"
        self._command = list(command)
        self._environment = dict(environment or {})
        self._package = package
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running daemon's process id."""
        if self._process is None:
            raise LabError(f"{self.name} does not run. Start it first.")
        return self._process.pid

    def running(self) -> bool:
        """Whether the process exists and has not ended; a stopped one (SIGSTOP) does."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, environment: Mapping[str, str | None] | None = None) -> None:
        """Begin to start it; waiting until it serves is the caller's. LabError when it runs already."""
        if self.running():
            raise LabError(f"{self.name} runs already, as process {self.pid}. Stop it first.")
        need(self._command[0], self._package)
        variables = {**self._environment, **(environment or {})}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ending_with_us(self._command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=own_environment(variables),
                start_new_session=True,  # Ctrl-C is for the parent, which ends what it started in its own order
            )

    def kill(self) -> None:
        """SIGKILL, as a crash or a power cut; returns when it is gone. Nothing happens to one that has ended."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(_KILL_SECONDS)
        self._process = None

    def terminate(self, timeout_s: float) -> int | None:
        """SIGTERM and its exit status, None when it did not run; killed, with a LabError, when it takes too long."""
        if self._process is None:
            return None
        # A stopped process takes the signal only when it goes on.
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise LabError(self.describe(f"{self.name} did not end within {timeout_s:g} s")) from error
        self._process = None
        return status

    def pause(self) -> None:
        """SIGSTOP; returns when the kernel has stopped all its threads."""
        os.kill(self.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        self.wait("is stopped", lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 10)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        """Until `condition` holds; LabError that says the daemon never `what`, also when it has ended meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running():
                status = self._process.poll() if self._process is not None else None
                raise LabError(self.describe(f"{self.name} ended with {status} before it {what}"))
            if time.monotonic() > deadline:
                raise LabError(self.describe(f"Waited {timeout_s:g} s, and {self.name} never {what}"))
            time.sleep(_POLL_SECONDS)

    def tail(self) -> str:
        """The end of its log."""
        return log_tail(self.log)

    def describe(self, problem: str) -> str:
        """`problem` with the end of the log."""
        return f"{problem}.\n--- {self.log}:\n{self.tail()}"


class Notifications:
    """A service manager's socket: tells when a daemon says READY=1 (sd_notify)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def wait_ready(self, daemon: Daemon, timeout_s: float) -> None:
        """Until it says so; LabError when it ends first or takes longer."""
        deadline = time.monotonic() + timeout_s
        pidfd = os.pidfd_open(daemon.pid)
        try:
            while (rest := deadline - time.monotonic()) > 0:
                ready, _, _ = select.select([self._socket.fileno(), pidfd], [], [], rest)
                if self._socket.fileno() in ready:
                    if b"READY=1" in self._socket.recv(4096).splitlines():
                        return
                elif ready:
                    raise LabError(daemon.describe(f"{daemon.name} ended before it was ready"))
        finally:
            os.close(pidfd)
        raise LabError(daemon.describe(f"{daemon.name} was not ready within {timeout_s:g} s"))

    def close(self) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)


def own_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's variables with `changes`; None takes one away."""
    merged: dict[str, str | None] = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def ending_with_us(command: Sequence[str]) -> list[str]:
    """`command` as it is killed when the thread that starts it ends."""
    return ["setpriv", "--pdeathsig", "KILL", "--", *command]


def need(program: str, package: str | None) -> None:
    """UnsupportedError that names the Debian package when `program` is not installed."""
    if shutil.which(program) is None:
        hint = f" Install Debian's package {package}, or run `make lab-packages`." if package else ""
        raise UnsupportedError(f"The program {program} is missing.{hint}")


def log_tail(path: Path) -> str:
    """The last lines of a log, or that there are none."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-_TAIL_LINES:]) or "It wrote no log."


def run(
    command: Sequence[str],
    *,
    package: str | None = None,
    timeout_s: float = 60,
    check: bool = True,
    environment: Mapping[str, str | None] | None = None,
) -> str:
    """A command that ends by itself; its standard output. With `check`, LabError with what it said when it fails.
    `environment` and `package` are as for a daemon."""
    need(command[0], package)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=own_environment(environment or {}),
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(command)}` did not end within {timeout_s:g} s.") from error
    if done.returncode and check:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-_TAIL_LINES:]
        raise LabError(f"`{' '.join(command)}` ended with {done.returncode}: " + "\n".join(said))
    return done.stdout


def free_ports(address: str, count: int) -> list[int]:
    """TCP ports that nobody listens on now, from below the kernel's range for outgoing connections, whose next one
    could take them before the daemon does."""
    found: list[int] = []
    # Runs that begin at the same time look in different places.
    first = 20000 + os.getpid() * 7 % 10000
    for port in range(first, first + 2000):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((address, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise LabError(f"There are no {count} free TCP ports at {address} from {first} on.")
