"""The supervisor, with stand-ins for the gateway that do what the test tells them over a socket."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringstone.gateway import supervise

# Says who it is, then does what it is told: a line "notify X|Y" or "exit N". SIGTERM and SIGINT end it with 0, or
# with 3 if "sour" is among its arguments; with "stubborn" SIGABRT does nothing.
STUB = """
import os, signal, socket, sys
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(3 if "sour" in sys.argv else 0))
if "stubborn" in sys.argv:
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
test = socket.socket(socket.AF_UNIX)
test.connect(sys.argv[1])
orders = test.makefile("rw")
print(os.getpid(), *sys.argv[2:], file=orders, flush=True)
address = "\\0" + os.environ["NOTIFY_SOCKET"][1:]
for line in orders:
    order, _, value = line.strip().partition(" ")
    if order == "exit":
        os._exit(int(value))
    if order == "answer":
        print("here", file=orders, flush=True)
        continue
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(address)
        manager.send(value.replace("|", "\\n").encode())
"""
SECONDS = 30


class Stub:
    """One child of the supervisor."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SECONDS)
        self._orders = connection.makefile("rw")
        connection.close()
        pid, *self.arguments = self._orders.readline().split()
        self.pid = int(pid)
        self._pidfd = os.pidfd_open(self.pid)

    def tell(self, order: str) -> None:
        print(order, file=self._orders, flush=True)

    def hear(self) -> str:
        return self._orders.readline().strip()

    def notify(self, state: str) -> None:
        self.tell(f"notify {state}")

    def wait_end(self) -> None:
        ready, _, _ = select.select([self._pidfd], [], [], SECONDS)
        assert ready, "the child still runs"

    def running(self) -> bool:
        return not select.select([self._pidfd], [], [], 0)[0]

    def close(self) -> None:
        os.close(self._pidfd)
        self._orders.close()


class Supervised:
    """A supervisor of stubs, and the service manager above it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(SECONDS)
        self._listener.bind(str(folder / "orders"))
        self._listener.listen(8)
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.settimeout(SECONDS)
        self.manager.bind(str(folder / "notify"))
        (folder / "stub.py").write_text(STUB)
        self._stubs: list[Stub] = []
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def start(self, *stub: str, watchdog_s: float = SECONDS, takeover_s: float = SECONDS) -> Stub:
        command = [
            *(sys.executable, "-I", "-S", supervise.__file__),
            *("--watchdog-s", str(watchdog_s), "--takeover-s", str(takeover_s), "--"),
            *(sys.executable, "-I", "-S", str(self._folder / "stub.py"), str(self._folder / "orders"), *stub),
        ]
        kept = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
        self._process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=kept | {"NOTIFY_SOCKET": str(self._folder / "notify"), "WATCHDOG_PID": "1"},
        )
        return self.child()

    def child(self) -> Stub:
        """The next one that starts."""
        ended = os.pidfd_open(self.process.pid)
        ready, _, _ = select.select([self._listener.fileno(), ended], [], [], SECONDS)
        os.close(ended)
        assert self._listener.fileno() in ready, f"no child was started: {self.end() if ready else 'in time'}"
        connection, _ = self._listener.accept()
        self._stubs.append(Stub(connection))
        return self._stubs[-1]

    def ready(self, child: Stub) -> None:
        """Returns when the supervisor knows it."""
        child.notify("READY=1")
        assert self.told() == "READY=1"

    def told(self) -> str:
        return self.manager.recv(256).decode()

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it said; it must end by itself."""
        _, said = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, said

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stub in self._stubs:
            if stub.running():
                os.kill(stub.pid, signal.SIGKILL)
            stub.close()
        if self._process is not None and self._process.stderr is not None:
            self._process.stderr.close()
        self._listener.close()
        self.manager.close()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    one = Supervised(tmp_path)
    yield one
    one.close()


def crash(child: Stub) -> None:
    os.kill(child.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "end",
    [crash, lambda child: child.tell("exit 0"), lambda child: child.tell("exit 3")],
    ids=["killed", "status 0", "status 3"],
)
def test_a_child_that_ends_unasked_is_started_again(
    supervised: Supervised, end: Callable[[Stub], None]
) -> None:
    first = supervised.start("gateway")
    assert first.arguments == ["gateway"]
    supervised.ready(first)
    end(first)
    second = supervised.child()
    assert second.arguments == ["gateway"]
    supervised.ready(second)
    status, said = supervised.stop()
    assert status == 0
    assert f"process {first.pid}" in said
    assert "it is started again" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_and_the_status_comes_back(
    supervised: Supervised, number: signal.Signals
) -> None:
    child = supervised.start()
    supervised.ready(child)
    supervised.process.send_signal(number)
    assert supervised.end() == (0, "")
    child.wait_end()


def test_a_stop_that_ends_badly_is_told(supervised: Supervised) -> None:
    supervised.ready(supervised.start("sour"))
    assert supervised.stop() == (3, "")


def test_a_first_start_that_fails_is_for_a_person_to_correct(supervised: Supervised) -> None:
    child = supervised.start()
    child.tell("exit 5")
    assert supervised.end() == (5, "")


def test_one_that_cannot_start_any_more_is_tried_again(supervised: Supervised) -> None:
    first = supervised.start()
    supervised.ready(first)
    crash(first)
    for _ in range(3):
        supervised.child().tell("exit 1")
    supervised.ready(supervised.child())
    assert supervised.stop()[0] == 0


@pytest.mark.parametrize("stub", [(), ("stubborn",)], ids=["SIGABRT", "SIGKILL"])
def test_a_silent_watchdog_ends_the_child(
    supervised: Supervised, stub: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = supervised.start(*stub, watchdog_s=0.2)
    supervised.ready(first)
    for _ in range(3):
        first.notify("WATCHDOG=1")
        assert supervised.told() == "WATCHDOG=1"
    second = supervised.child()
    first.wait_end()
    second.notify("STOPPING=1")
    _, said = supervised.stop()
    assert "gives no sign of life" in said
    assert ("by SIGKILL" if stub else "by SIGABRT") in said


def test_a_stop_of_its_own_is_not_hurried_by_the_watchdog(supervised: Supervised) -> None:
    child = supervised.start(watchdog_s=0.05)
    child.notify("READY=1|STOPPING=1")
    assert supervised.told() == "READY=1\nSTOPPING=1"
    assert not select.select([child._pidfd], [], [], 0.5)[0]
    assert "no sign of life" not in supervised.stop()[1]


def test_strangers_and_their_messages_are_ignored(supervised: Supervised) -> None:
    child = supervised.start()
    environment = Path(f"/proc/{child.pid}/environ").read_text().split("\0")
    address = next(word for word in environment if word.startswith("NOTIFY_SOCKET="))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"READY=1", "\0" + address.removeprefix("NOTIFY_SOCKET=@"))
    child.notify("MAINPID=1|STATUS=mine")
    assert supervised.told() == "STATUS=mine"
    assert "WATCHDOG_PID=1" not in environment
    assert supervised.stop()[0] == 0


# Upgrades.


def test_an_upgrade_changes_over_when_the_successor_is_ready(supervised: Supervised) -> None:
    old = supervised.start("gateway", watchdog_s=5)
    supervised.ready(old)
    supervised.process.send_signal(signal.SIGHUP)
    new = supervised.child()
    assert new.arguments == ["gateway", "--takeover"]
    assert old.running()
    supervised.ready(new)
    old.tell("exit 0")
    old.wait_end()
    assert new.running()
    # From now on it is the one that is started again, and without the flag.
    crash(new)
    third = supervised.child()
    assert third.arguments == ["gateway"]
    supervised.ready(third)
    status, said = supervised.stop()
    assert status == 0
    assert f"Process {new.pid} has taken over" in said
    assert f"The former gateway (process {old.pid}) has ended." in said


@pytest.mark.parametrize("how", ["ends", "crashes", "is silent"])
def test_a_successor_that_fails_changes_nothing(supervised: Supervised, how: str) -> None:
    old = supervised.start(takeover_s=0.2 if how == "is silent" else SECONDS)
    supervised.ready(old)
    supervised.process.send_signal(signal.SIGHUP)
    new = supervised.child()
    if how == "ends":
        new.tell("exit 9")
    if how == "crashes":
        crash(new)
    new.wait_end()
    # The old one is still the main one: what it says is passed on, and its end is a crash.
    old.notify("STATUS=here")
    assert supervised.told() == "STATUS=here"
    crash(old)
    supervised.ready(supervised.child())
    _, said = supervised.stop()
    assert "before it was ready; nothing changes" in said
    assert ("has said nothing for 0.2 s" in said) == (how == "is silent")


def test_a_crash_in_the_middle_of_an_upgrade_starts_afresh(supervised: Supervised) -> None:
    old = supervised.start()
    supervised.ready(old)
    supervised.process.send_signal(signal.SIGHUP)
    new = supervised.child()
    crash(old)
    fresh = supervised.child()
    new.wait_end()
    assert fresh.arguments == []
    supervised.ready(fresh)
    assert supervised.stop()[0] == 0


def test_an_upgrade_of_a_gateway_that_is_not_ready_is_refused(supervised: Supervised) -> None:
    child = supervised.start()
    supervised.process.send_signal(signal.SIGHUP)
    assert supervised.process.stderr is not None
    assert "No upgrade now" in supervised.process.stderr.readline()
    supervised.ready(child)
    assert supervised.stop() == (0, "")


def test_children_outlive_a_supervisor_that_is_killed(supervised: Supervised) -> None:
    child = supervised.start()
    supervised.ready(child)
    supervised.process.kill()
    supervised.process.wait()
    child.tell("answer")
    assert child.hear() == "here"
