"""A booted guest that does what an operator types: `guest.run("mkfs.ext4 /dev/vda")`, `guest.fio(...)`,
`guest.reboot()`.

The other end is guest-agent.sh, whose head describes the wire format.
"""

import base64
import contextlib
import re
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from qemu.qmp import QMPError

from ringstone.errors import RingstoneError
from ringstone.hypervisor.args import reconnect_option
from ringstone.hypervisor.fio import FioJob, FioResult, fio_command, parse_fio
from ringstone.hypervisor.qemu import Qemu, QemuConfig, QemuError

BOOT_TIMEOUT_S = 90.0
_READY = re.compile(rb"RINGSTONE-GUEST-READY ([0-9a-f-]{36})\n")
_REPLY = re.compile(rb"REPLY (\d+) (\d+) (\d+) (\d+)\n")


class GuestError(RingstoneError):
    """The guest is of no further use: it went away, restarted by itself or did not answer in time."""


class CommandFailed(RingstoneError):
    """A command in the guest ended with an exit code other than 0."""

    def __init__(self, command: str, result: "CommandResult") -> None:
        said = (result.stderr.strip() or result.stdout.strip())[-2000:]
        super().__init__(
            f"`{command}` ended with exit code {result.exit_code} in the guest: {said or 'no output'}"
        )
        self.command = command
        self.result = result


@dataclass(frozen=True)
class CommandResult:
    """How a command in the guest ended."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Command:
    """A command that runs in the guest; `wait` gives its end."""

    guest: "Guest"
    number: int
    text: str

    def wait(self, *, timeout_s: float = 60, check: bool = True) -> CommandResult:
        """How it ended; raises CommandFailed for an exit code other than 0 if `check`."""
        result = self.guest._reply(self.number, self.text, timeout_s)
        if check and result.exit_code:
            raise CommandFailed(self.text, result)
        return result


class Guest:
    """A guest that has booted and answers. Times are seconds."""

    def __init__(self, config: QemuConfig, *, boot_timeout_s: float = BOOT_TIMEOUT_S) -> None:
        self.qemu = Qemu(config)
        self._received = bytearray()
        self._results: dict[int, CommandResult] = {}
        self._last_number = 0
        try:
            self.boot_id = self._wait_ready(boot_timeout_s)
        except BaseException:
            self.qemu.stop()
            raise

    # What an operator does.

    def run(self, command: str, *, timeout_s: float = 60, check: bool = True) -> CommandResult:
        """Run a shell command in the guest and wait for its end."""
        return self.start(command).wait(timeout_s=timeout_s, check=check)

    def output(self, command: str, *, timeout_s: float = 60) -> str:
        """The command's standard output, stripped."""
        return self.run(command, timeout_s=timeout_s).stdout.strip()

    def start(self, command: str) -> Command:
        """Start a shell command in the guest and go on; several may run beside each other."""
        self._last_number += 1
        line = b"%d %s\n" % (self._last_number, base64.b64encode(command.encode()))
        try:
            self.qemu.agent.sendall(line)
        except OSError as error:
            raise GuestError(self.qemu.describe("The guest has gone")) from error
        return Command(self, self._last_number, command)

    def fio(self, job: FioJob, *, timeout_s: float | None = None) -> FioResult:
        """Run fio; raises CommandFailed when it or its verification fails, or when it did nothing at all."""
        command = fio_command(job)
        ended = self.run(command, timeout_s=timeout_s or job.seconds + 120)
        result = parse_fio(ended.stdout)
        # fio ends with exit code 0 where it refuses a job, a mounted disk for one.
        if result.errors or not result.operations:
            raise CommandFailed(command, ended)
        return result

    def reboot(self, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Unmount, restart the guest's kernel and wait until it answers again. QEMU and its disks stay."""
        self._leave("umount -a -r; sync; reboot -f", "RESET", timeout_s)
        self._received.clear()
        self._results.clear()
        boot_id = self._wait_ready(timeout_s)
        if boot_id == self.boot_id:
            raise GuestError(self.qemu.describe("The guest answered a reboot without restarting"))
        self.boot_id = boot_id

    def shutdown(self, *, timeout_s: float = 60) -> None:
        """Unmount, power off and wait for QEMU's end."""
        self._leave("umount -a -r; sync; poweroff -f", "SHUTDOWN", timeout_s)
        status = self.qemu.wait(timeout_s)
        self.qemu.stop()
        if status:
            raise GuestError(self.qemu.describe("QEMU failed while the guest powered off"))

    def moved_to(self, qemu: Qemu) -> None:
        """The guest has migrated and goes on in `qemu`: its agent, and commands that were started, answer there. The
        QEMU it came from stays the caller's to end."""
        # What the guest said before it left; the rest of a reply that was cut in two comes from the new one.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while said := self.qemu.agent.recv(1 << 16, socket.MSG_DONTWAIT):
                self._received += said
        self.qemu = qemu

    def stop(self) -> None:
        """End QEMU at once, as when the power fails. Idempotent."""
        self.qemu.stop()

    # Disks that come and go while the guest runs.

    def plug(self, path: str, *, name: str, queues: int = 1, slot: int = 0) -> None:
        """Hot-plug the vhost-user-blk disk at socket `path` into PCI Express slot `slot`."""
        address: Mapping[str, object] = {"type": "unix", "data": {"path": path}}
        qmp = self.qemu.qmp
        reconnect, value = reconnect_option(1, qmp.version())
        backend = {"type": "socket", "data": {"addr": address, "server": False, reconnect: value}}
        qmp.execute("chardev-add", {"id": f"{name}-socket", "backend": backend})
        device = {
            "driver": "vhost-user-blk-pci",
            "id": name,
            "chardev": f"{name}-socket",
            "num-queues": queues,
            "packed": True,
        }
        qmp.execute("device_add", {**device, "bus": f"hotplug{slot}"})

    def unplug(self, name: str, *, timeout_s: float = 60) -> None:
        """Ask the guest to let go of a hot-plugged disk and wait until QEMU has closed its socket."""
        qmp = self.qemu.qmp
        qmp.forget_events()
        qmp.execute("device_del", {"id": name})
        deadline = time.monotonic() + timeout_s
        while True:
            event = qmp.wait_event({"DEVICE_DELETED"}, timeout_s=deadline - time.monotonic())
            if event.data.get("device") == name:
                break
        qmp.execute("chardev-remove", {"id": f"{name}-socket"})

    # The channel.

    def _leave(self, command: str, event: str, timeout_s: float) -> None:
        self.qemu.qmp.forget_events()
        self.start(command)
        try:
            self.qemu.qmp.wait_event({event}, timeout_s=timeout_s)
        except (QMPError, EOFError, TimeoutError) as error:
            raise GuestError(self.qemu.describe(f"No {event} came from QEMU after `{command}`")) from error

    def _wait_ready(self, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while not (found := _READY.search(self._received)):
            self._receive(deadline, "boot")
        boot_id = found[1].decode()  # a match only borrows the bytes
        del self._received[: found.end()]
        return boot_id

    def _reply(self, number: int, command: str, timeout_s: float) -> CommandResult:
        deadline = time.monotonic() + timeout_s
        while number not in self._results:
            if not self._take_reply():
                self._receive(deadline, f"answer `{command}`")
        return self._results.pop(number)

    def _take_reply(self) -> bool:
        """Move one whole reply from the received bytes to the results."""
        found = _REPLY.match(self._received)
        if found is None:
            if _READY.search(self._received):
                raise GuestError(self.qemu.describe("The guest restarted by itself"))
            return False
        number, exit_code, out_bytes, err_bytes = (int(field) for field in found.groups())
        out_end = found.end() + out_bytes
        end = out_end + err_bytes
        if len(self._received) < end:
            return False
        stdout = self._received[found.end() : out_end].decode(errors="replace")
        stderr = self._received[out_end:end].decode(errors="replace")
        del self._received[:end]
        self._results[number] = CommandResult(exit_code, stdout, stderr)
        return True

    def _receive(self, deadline: float, wanted: str) -> None:
        """Wait for more bytes from the guest."""
        ready, _, _ = select.select([self.qemu.agent], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise GuestError(self.qemu.describe(f"The guest did not {wanted} in time"))
        try:
            received = self.qemu.agent.recv(1 << 16)
        except ConnectionError:
            received = b""
        if not received:
            try:
                self.qemu.wait(10)
            except QemuError:
                raise GuestError(self.qemu.describe("QEMU closed the guest's channel")) from None
            raise GuestError(self.qemu.describe(f"QEMU ended; the guest did not {wanted}"))
        self._received += received

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def devices_of(guest: Guest) -> Sequence[str]:
    """The guest's virtio disks by name, in their order: vda, vdb."""
    return guest.output("ls /sys/block | grep '^vd' || true").split()
