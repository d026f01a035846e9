"""The channel to a guest: replies, restarts and deadlines. The guest's end is played by the test."""

import base64
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ringstone.hypervisor import guest as guest_module
from ringstone.hypervisor.guest import CommandFailed, Guest, GuestError
from ringstone.hypervisor.guest_image import GuestImage
from ringstone.hypervisor.qemu import QemuConfig

BOOT = b"RINGSTONE-GUEST-READY 0f7e8a52-0000-4000-8000-000000000001\n"
REBOOT = b"RINGSTONE-GUEST-READY 0f7e8a52-0000-4000-8000-000000000002\n"
CONFIG = QemuConfig(GuestImage(Path("kernel"), Path("initrd"), "6.1"), "tcg", Path("folder"))


class QemuStandIn:
    """Has the channel of a QEMU, and nothing behind it but the test."""

    def __init__(self, _: QemuConfig) -> None:
        self.agent, self.inside = socket.socketpair()
        self.inside.sendall(b"noise of a console\n" + BOOT)

    def describe(self, problem: str) -> str:
        return problem

    def wait(self, _: float) -> int:
        return 0

    def stop(self) -> None:
        self.agent.close()
        self.inside.close()


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    monkeypatch.setattr(guest_module, "Qemu", QemuStandIn)
    with Guest(CONFIG) as booted:
        yield booted


def _inside(guest: Guest) -> socket.socket:
    assert isinstance(guest.qemu, QemuStandIn)
    return guest.qemu.inside


def test_the_boot_is_known_by_its_id(guest: Guest) -> None:
    assert guest.boot_id == "0f7e8a52-0000-4000-8000-000000000001"


def test_a_command_is_sent_as_one_line_whatever_is_in_it(guest: Guest) -> None:
    guest.start("echo 'a\nb' | cat")
    number, script = _inside(guest).recv(4096).split()
    assert number == b"1"
    assert base64.b64decode(script) == b"echo 'a\nb' | cat"


def test_replies_are_taken_apart_however_they_arrive(guest: Guest) -> None:
    first, second = guest.start("first"), guest.start("second")
    reply = b"REPLY 2 0 7 2\nREPLY 1" + b"ee" + b"REPLY 1 3 0 5\nwrong"

    def trickle() -> None:
        for index in range(len(reply)):
            _inside(guest).sendall(reply[index : index + 1])

    sender = threading.Thread(target=trickle)
    sender.start()
    failed = first.wait(check=False)
    sender.join()
    assert (failed.exit_code, failed.stdout, failed.stderr) == (3, "", "wrong")
    done = second.wait()
    assert (done.exit_code, done.stdout, done.stderr) == (0, "REPLY 1", "ee")


def test_a_failing_command_says_what_it_said(guest: Guest) -> None:
    _inside(guest).sendall(b"REPLY 1 1 0 14\nno such device")
    with pytest.raises(CommandFailed, match=r"`mount /dev/vdz` ended with exit code 1 .*no such device"):
        guest.run("mount /dev/vdz")


def _restarts(inside: socket.socket) -> None:
    inside.sendall(REBOOT)


def _ends(inside: socket.socket) -> None:
    inside.shutdown(socket.SHUT_RDWR)


def _says_nothing(_: socket.socket) -> None:
    pass


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (_restarts, "restarted by itself"),
        (_ends, "QEMU ended"),
        (_says_nothing, "did not answer `true` in time"),
    ],
)
def test_a_guest_that_is_lost_is_an_error(
    guest: Guest, behaviour: Callable[[socket.socket], None], message: str
) -> None:
    command = guest.start("true")
    behaviour(_inside(guest))
    with pytest.raises(GuestError, match=message):
        command.wait(timeout_s=0.01)


def test_a_guest_that_does_not_boot_is_an_error_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[QemuStandIn] = []

    class Silent(QemuStandIn):
        def __init__(self, config: QemuConfig) -> None:
            super().__init__(config)
            self.agent.recv(4096)
            made.append(self)

    monkeypatch.setattr(guest_module, "Qemu", Silent)
    with pytest.raises(GuestError, match="did not boot in time"):
        Guest(CONFIG, boot_timeout_s=0.01)
    assert made[0].agent.fileno() == -1
