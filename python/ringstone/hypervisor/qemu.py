"""Runs one QEMU process: starts it with its own console log, QMP session and agent channel, and ends it by
its pid.

QEMU inherits one end of a socket pair for QMP and one for the agent channel, so there is no socket file to
wait for and the other end reads end-of-file the moment QEMU is gone.
"""

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from qemu.qmp import QMPError

from ringstone.errors import RingstoneError
from ringstone.hypervisor.args import Disk, memory_args
from ringstone.hypervisor.guest_image import GuestImage
from ringstone.hypervisor.qmp import QmpSession
from ringstone.hypervisor.versions import MONITOR_OBJECT, QEMU, QemuVersion

AcceleratorName = Literal["kvm", "tcg"]

AGENT_PORT = "ringstone.agent"
_SERIAL_AGENT = "/dev/ttyS1"  # the first has the console
HOTPLUG_SLOTS = 2
CONSOLE_TAIL_LINES = 25
_CPU = {"kvm": "host", "tcg": "max"}
_KERNEL = "console=ttyS0 panic=-1 audit=0"
# Speculation mitigations protect nothing in an emulated CPU and only slow it down.
_KERNEL_EXTRA = {"kvm": "", "tcg": " mitigations=off"}


class QemuError(RingstoneError):
    """QEMU did not start or went away; the message ends with the tail of its output and of the guest's
    console."""


@dataclass(frozen=True)
class QemuConfig:
    """One VM. `disks` are its volumes, and `devices` further arguments; `folder` takes
    the console log and QEMU's own output; `memory_bytes` is a multiple of 2 MiB, to which an emulated guest that is not
    in huge pages gets two pages more, so that it can be migrated. `kernel_arguments` go onto the kernel's command line.

    `serial_agent`: the guest's agent answers on a serial port instead of a virtio one, for a migration between versions
    that differ in the latter (RINGS_OF_1024).

    `program`: a QEMU other than the installed one. For a migration both ends have the same `machine`, a versioned
    one such as pc-q35-7.2 where their QEMUs differ, and the same named `cpu` model (the default is all that the
    accelerator has). `incoming`: waits for a guest instead of booting one; "defer", or a URI such as unix:/x.sock."""

    image: GuestImage
    accelerator: AcceleratorName
    folder: Path
    disks: Sequence[Disk] = ()
    devices: Sequence[str] = ()
    cpus: int = 2
    memory_bytes: int = 512 << 20
    hugepages: bool = False
    program: Path | None = None
    machine: str = "q35"
    cpu: str | None = None
    incoming: str | None = None
    kernel_arguments: str = ""
    serial_agent: bool = False


class Qemu:
    """A running QEMU. `agent` is the host's end of the guest's virtio-serial port, `qmp` the monitor."""

    agent: socket.socket
    qmp: QmpSession

    def __init__(self, config: QemuConfig) -> None:
        self.config = config
        self.console_log = config.folder / "console.log"
        self.output_log = config.folder / "qemu.log"
        program = shutil.which(config.program or QEMU)
        if program is None:
            wanted = config.program or QEMU
            raise QemuError(f"The program {wanted} is missing; install Debian's package qemu-system-x86.")
        version = QemuVersion.of_program(program)
        disks = [argument for disk in config.disks for argument in disk.args(version)]
        config.folder.mkdir(parents=True, exist_ok=True)
        self.agent, agent_peer = socket.socketpair()
        qmp, qmp_peer = socket.socketpair()
        with agent_peer, qmp_peer, self.output_log.open("wb") as output:
            descriptors = (agent_peer.fileno(), qmp_peer.fileno())
            command = [program, *_arguments(config, version, disks, self.console_log, *descriptors)]
            self._process = subprocess.Popen(
                # A QEMU that outlived a killed parent would keep the guest's memory and the volume's socket.
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(agent_peer.fileno(), qmp_peer.fileno()),
                start_new_session=True,  # Ctrl-C is for the parent, which ends QEMU in its own order
            )
        try:
            self.qmp = QmpSession(qmp)
        except BaseException as error:
            self.agent.close()
            self._end_process()
            if isinstance(error, QMPError | EOFError | OSError):
                raise QemuError(self.describe("QEMU did not start")) from error
            raise

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def running(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """QEMU's exit status, after a guest has powered off. Raises QemuError when it still runs then."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise QemuError(self.describe(f"QEMU still runs after {timeout_s} s")) from error

    def describe(self, problem: str) -> str:
        """`problem` with the exit status if there is one and the tails of QEMU's output and of the
        console."""
        status = self._process.poll()
        first_words = _tail(self.output_log).partition("\n")[0]
        ended = (
            f" (exit status {status}{': ' if first_words else ''}{first_words})" if status is not None else ""
        )
        parts = [f"{problem}{ended}."]
        for title, path in (("QEMU said", self.output_log), ("the console's last lines", self.console_log)):
            if tail := _tail(path):
                parts.append(f"--- {title} ({path}):\n{tail}")
        if complaints := _complaints(self.console_log):
            parts.append(f"--- the guest's kernel complained:\n{complaints}")
        return "\n".join(parts)

    def stop(self) -> None:
        """End QEMU at once, as when the power fails. Idempotent."""
        self.agent.close()
        if self.running():
            with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
                self.qmp.execute("quit")
        self._end_process()
        self.qmp.close()

    def _end_process(self) -> None:
        for end in (self._process.terminate, self._process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
                return
            end()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _arguments(
    config: QemuConfig,
    version: QemuVersion,
    disks: Sequence[str],
    console_log: Path,
    agent_fd: int,
    qmp_fd: int,
) -> list[str]:
    accelerator = config.accelerator
    threads = ",thread=multi" if accelerator == "tcg" else ""
    hotplug = []
    for slot in range(HOTPLUG_SLOTS):
        hotplug += ["-device", f"pcie-root-port,id=hotplug{slot},chassis={slot + 1},slot={slot + 1}"]
    return [
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", config.machine, "-accel", accelerator + threads),
        *("-cpu", config.cpu or _CPU[accelerator]),
        *("-smp", str(config.cpus)),
        *memory_args(
            config.memory_bytes,
            hugepages=config.hugepages,
            emulated=accelerator == "tcg" and not config.hugepages,
        ),
        *("-kernel", str(config.image.kernel), "-initrd", str(config.image.initrd)),
        *("-append", _kernel_arguments(config)),
        *("-chardev", f"file,id=console,path={console_log},append=on", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}"),
        *(
            ("-object", "monitor-qmp,id=monitor,chardev=qmp")
            if MONITOR_OBJECT(version)
            else ("-mon", "chardev=qmp,mode=control")
        ),
        *("-chardev", f"socket,id=agent,fd={agent_fd}"),
        *_agent_port(config),
        *hotplug,
        *disks,
        *config.devices,
        *(("-incoming", config.incoming) if config.incoming else ()),
    ]


def _kernel_arguments(config: QemuConfig) -> str:
    agent = f" ringstone.agent={_SERIAL_AGENT}" if config.serial_agent else ""
    return f"{_KERNEL}{_KERNEL_EXTRA[config.accelerator]}{agent} {config.kernel_arguments}".rstrip()


def _agent_port(config: QemuConfig) -> list[str]:
    if config.serial_agent:
        return ["-serial", "chardev:agent"]
    return ["-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]


def _complaints(console: Path) -> str:
    """What a tail misses when a guest restarts after a panic."""
    try:
        lines = console.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    found = [line.rstrip() for line in lines if re.search(r"Kernel panic|BUG:|Oops:|I/O error", line)]
    return "\n".join(found[-CONSOLE_TAIL_LINES:])


def _tail(path: Path) -> str:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(line.rstrip() for line in text.strip().splitlines()[-CONSOLE_TAIL_LINES:])
