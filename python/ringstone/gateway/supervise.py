"""`ringstone gateway --supervise`: keeps a gateway running where no service manager does.

A small parent process, run as a file of its own by `python -I -S` (see ringstone.cli.gateway_start), so that it
imports next to nothing and has next to nothing to fail with. Its children speak sd_notify(3) to it as they would
to systemd, and it attributes each message to a child by the process id that the kernel attaches (SCM_CREDENTIALS,
unix(7)). Nothing here runs by the clock but deadlines.

- A child that ends without being asked is started again, at once if it had been ready. The gateway itself slows
  down where it crashes in a row (ringstone.gateway.starts).
- One whose watchdog stays silent gets SIGABRT, after a moment SIGKILL, and is then started again.
- SIGTERM and SIGINT are passed on; the supervisor ends with the status of its main child.
- SIGHUP upgrades: a second child with `--takeover` starts beside the first, and is the main one from its READY=1
  on. The first one then ends by itself. Until then it stays the main one, and one that is silent for too long or
  ends before it is ready is no loss.
- Children outlive a supervisor that is killed, as guests need them more than it. The next supervisor finds their
  lock taken and says so; end the old gateway first.
"""

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence

_CREDENTIALS = struct.Struct("3i")
_MESSAGE_BYTES = 4096

WATCHDOG_SECONDS = 10.0
# Until READY=1, longer where the child asks with EXTEND_TIMEOUT_USEC; as systemd's TimeoutStartSec.
START_SECONDS = 90.0
# How long a successor may be silent.
TAKEOVER_SECONDS = 60.0
# From SIGABRT, which leaves a core file, to SIGKILL.
ABORT_SECONDS = 5.0
# Before the next start of a child that ended before it was ready.
_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 10.0


class _Child:
    """`deadline` is CLOCK_MONOTONIC; what has run out by then is `awaited`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        # In a session of its own: a terminal's Ctrl-C and hang-up are for the supervisor, which passes on what is
        # meant.
        self.pid = os.posix_spawn(command[0], list(command), environment, setsid=True)
        self.pidfd = os.pidfd_open(self.pid)
        self.ready = False
        self.deadline: float | None = None
        self.awaited = ""

    def expect(self, awaited: str, seconds: float | None) -> None:
        self.awaited = awaited
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def kill(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int:
        """Its exit status, negative for a signal. Only once its pidfd is readable."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)


class Supervisor:
    """`command` starts a gateway."""

    def __init__(self, command: Sequence[str], *, watchdog_s: float, takeover_s: float) -> None:
        self._command = list(command)
        self._watchdog_s = watchdog_s
        self._takeover_s = takeover_s
        self._main: _Child | None = None
        self._successor: _Child | None = None
        self._retiring: list[_Child] = []
        self._stopping = False
        self._ever_ready = False
        self._failures = 0
        self._restart_at: float | None = None
        self._status = 0
        # An address in the abstract namespace that the kernel chooses: no file to leave behind.
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.bind("")
        self._signals, wake = socket.socketpair()
        self._signals.setblocking(False)
        wake.setblocking(False)
        self._wake = wake
        self._poll = select.poll()
        self._poll.register(self._signals, select.POLLIN)
        self._poll.register(self._notify, select.POLLIN)

    def run(self) -> int:
        """Until told to stop, or until the first start fails. The exit status."""
        signal.set_wakeup_fd(self._wake.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._start_main()
        while self._main or self._successor or self._retiring or self._restart_at is not None:
            self._poll.poll(self._milliseconds())
            # What a child said before it ended counts, so messages come before ends.
            self._take_messages()
            self._take_ends()
            self._take_signals()
            self._take_deadlines()
        return self._status

    def _children(self) -> list[_Child]:
        return [child for child in (self._main, self._successor, *self._retiring) if child]

    def _spawn(self, *more: str) -> _Child:
        environment = {name: value for name, value in os.environ.items() if name != "WATCHDOG_PID"}
        address = self._notify.getsockname()
        environment["NOTIFY_SOCKET"] = "@" + address[1:].decode()
        environment["WATCHDOG_USEC"] = str(int(self._watchdog_s * 1_000_000))
        child = _Child([*self._command, *more], environment)
        self._poll.register(child.pidfd, select.POLLIN)
        return child

    def _start_main(self) -> None:
        self._restart_at = None
        try:
            self._main = self._spawn()
        except OSError as error:
            _say(f"The gateway cannot be started: {error}.")
            self._start_later()
        else:
            self._main.expect("start", START_SECONDS)

    def _start_later(self) -> None:
        self._failures += 1
        delay = min(_FIRST_DELAY_SECONDS * 2.0 ** min(self._failures - 1, 10), _LONGEST_DELAY_SECONDS)
        self._restart_at = time.monotonic() + delay

    # Deadlines.

    def _milliseconds(self) -> float | None:
        deadlines = [child.deadline for child in self._children()] + [self._restart_at]
        first = min((deadline for deadline in deadlines if deadline is not None), default=None)
        return None if first is None else max(0.0, first - time.monotonic()) * 1000 + 1

    def _take_deadlines(self) -> None:
        now = time.monotonic()
        if self._restart_at is not None and now >= self._restart_at:
            self._start_main()
        for child in self._children():
            if child.deadline is None or now < child.deadline:
                continue
            if child.awaited == "abort":
                child.kill(signal.SIGKILL)
                child.expect("kill", None)
            elif child is self._successor:
                _say(
                    f"The successor (process {child.pid}) has said nothing for {self._takeover_s:g} s: it is killed."
                )
                child.kill(signal.SIGKILL)
                child.expect("kill", None)
            else:
                silent = "has not become ready" if child.awaited == "start" else "gives no sign of life"
                _say(f"The gateway (process {child.pid}) {silent}: it is aborted and started again.")
                child.kill(signal.SIGABRT)
                child.expect("abort", ABORT_SECONDS)

    # Messages.

    def _take_messages(self) -> None:
        while True:
            try:
                text, ancillary, _, _ = self._notify.recvmsg(
                    _MESSAGE_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return
            pid = 0
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    pid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
            for child in self._children():
                if child.pid == pid:
                    self._take_message(child, text.decode(errors="replace").splitlines())

    def _take_message(self, child: _Child, lines: list[str]) -> None:
        if child.awaited in ("abort", "kill"):
            return
        if child is self._successor:
            child.expect("takeover", self._takeover_s)
        for line in lines:
            name, _, value = line.partition("=")
            if line == "READY=1":
                self._became_ready(child)
            elif line == "WATCHDOG=1" and child.ready and child.awaited == "watchdog":
                child.expect("watchdog", self._watchdog_s)
            elif line == "STOPPING=1":
                child.expect("stop", None)
            elif name == "EXTEND_TIMEOUT_USEC" and value.isdigit() and child.awaited == "start":
                child.expect("start", max(int(value) / 1_000_000, START_SECONDS))
        if child is self._main:
            _pass_on("\n".join(line for line in lines if not line.startswith("MAINPID=")))

    def _became_ready(self, child: _Child) -> None:
        child.ready = True
        self._ever_ready = True
        self._failures = 0
        child.expect("watchdog", self._watchdog_s)
        if child is self._successor:
            _say(f"Process {child.pid} has taken over.")
            if self._main:
                self._main.expect("retire", None)
                self._retiring.append(self._main)
            self._main, self._successor = child, None

    # Ends.

    def _take_ends(self) -> None:
        # The main one last: a successor that ended before it changed nothing.
        for child in reversed(self._children()):
            if not _readable(child.pidfd):
                continue
            # Read again: it may have spoken between our reading and its end.
            self._take_messages()
            self._poll.unregister(child.pidfd)
            self._ended(child, child.reap())

    def _ended(self, child: _Child, status: int) -> None:
        if child in self._retiring:
            self._retiring.remove(child)
            _say(f"The former gateway (process {child.pid}) has ended{'' if status == 0 else _how(status)}.")
        elif child is self._successor:
            self._successor = None
            if self._main:
                _say(
                    f"The successor (process {child.pid}) ended{_how(status)} before it was ready; nothing changes."
                )
            elif not self._stopping:
                self._start_main()
        else:
            self._main = None
            self._main_ended(child, status)

    def _main_ended(self, child: _Child, status: int) -> None:
        if self._stopping:
            # One that was told before it could listen, while it was starting, has done as it was told.
            told = status in (-signal.SIGTERM, -signal.SIGINT)
            self._status = 0 if told else status if status >= 0 else 128 - status
            return
        if not self._ever_ready and status > 0:
            # What never worked is for a person to correct; its own message has just been printed.
            self._status = status
            return
        _say(
            f"The gateway (process {child.pid}) ended{_how(status)} without being asked; it is started again."
        )
        if self._successor:
            # It was to take over from a process that is no more. A fresh start is quick and sure.
            self._successor.kill(signal.SIGKILL)
            self._successor.expect("kill", None)
        elif child.ready:
            self._start_main()
        else:
            self._start_later()

    # Signals.

    def _take_signals(self) -> None:
        try:
            numbers = self._signals.recv(64)
        except BlockingIOError:
            return
        for number in numbers:
            if number == signal.SIGHUP:
                self._upgrade()
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True
                self._restart_at = None
                for child in self._children():
                    child.kill(number)
                    if child.awaited != "abort":
                        child.expect("stop", None)

    def _upgrade(self) -> None:
        if self._stopping or not self._main or not self._main.ready or self._successor or self._retiring:
            _say(
                "No upgrade now: the gateway is starting, stopping or being upgraded. Try again in a moment."
            )
            return
        try:
            self._successor = self._spawn("--takeover")
        except OSError as error:
            _say(f"No upgrade: the new gateway cannot be started: {error}.")
            return
        self._successor.expect("takeover", self._takeover_s)
        _say(f"Process {self._successor.pid} is to take over from process {self._main.pid}.")


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _how(status: int) -> str:
    return f" with status {status}" if status >= 0 else f" by {signal.Signals(-status).name}"


def _say(message: str) -> None:
    """To standard error, in the gateway's own format."""
    if "JOURNAL_STREAM" in os.environ:
        text = f"<4>ringstone.supervisor: {message}\n"
    else:
        now = time.time()
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        text = f"{moment},{int(now * 1000) % 1000:03} WARNING ringstone.supervisor: {message}\n"
    # A log that nobody reads any more is no reason to leave guests without a supervisor.
    _unless_it_fails(lambda: os.write(2, text.encode()))


def _pass_on(state: str) -> None:
    """To the supervisor's own service manager, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address or not state:
        return
    where = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        _unless_it_fails(lambda: sender.sendto(state.encode(), where))


def _unless_it_fails(step: Callable[[], object]) -> None:
    try:
        step()
    except OSError:
        return


def main(arguments: Sequence[str]) -> int:
    """`[--watchdog-s SECONDS] [--takeover-s SECONDS] -- COMMAND...`"""
    rest = list(arguments)
    seconds = {"--watchdog-s": WATCHDOG_SECONDS, "--takeover-s": TAKEOVER_SECONDS}
    while len(rest) > 1 and rest[0] in seconds:
        name, value, *rest = rest
        seconds[name] = float(value)
    if rest[:1] != ["--"] or len(rest) < 2:
        print(
            "usage: supervise.py [--watchdog-s SECONDS] [--takeover-s SECONDS] -- COMMAND...", file=sys.stderr
        )
        return 2
    supervisor = Supervisor(rest[1:], watchdog_s=seconds["--watchdog-s"], takeover_s=seconds["--takeover-s"])
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
