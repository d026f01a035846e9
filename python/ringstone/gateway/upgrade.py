"""`ringstone gateway upgrade`: who starts the new process, and how a person hears what became of it.

A gateway under a supervisor of ours is told by SIGHUP; one under systemd is reloaded by systemd, so that the new
process belongs to the unit; any other one gets a successor that is started right here, from the Ringstone that
runs the command.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringstone import models
from ringstone.client import GatewayClient
from ringstone.errors import FailedError, StoppedError, UnreachableError

# From the start of the new process to its first answer, on a busy host.
LIMIT_SECONDS = 120.0
_LOOK_SECONDS = 0.02
_SUPERVISOR = "gateway/supervise.py"


@dataclass(frozen=True, slots=True)
class _Process:
    """What /proc says of a running gateway."""

    pid: int

    def arguments(self) -> list[str]:
        return _cmdline(self.pid)

    def directory(self) -> str | None:
        """Its working directory, where paths on its command line begin. None stands for our own, which a unit sets for
        both: a process with more rights than ours does not let us look, and has them from before its unit became
        stricter."""
        link = f"/proc/{self.pid}/cwd"
        try:
            return os.readlink(link)
        except PermissionError:
            return None

    def supervisor(self) -> int | None:
        """The process id of `ringstone gateway --supervise`, if this one is its child."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            # The second field is the name in parentheses, and may hold anything.
            parent = int(stat.rpartition(")")[2].split()[1])
            words = _cmdline(parent)
        except (OSError, ValueError, IndexError):
            return None
        return parent if any(word.endswith(_SUPERVISOR) for word in words) else None

    def unit(self) -> str | None:
        """The systemd service that it belongs to and we do not."""
        try:
            theirs, ours = (Path(f"/proc/{pid}/cgroup").read_text() for pid in (self.pid, "self"))
        except OSError:
            return None
        name = theirs.strip().rpartition("/")[2]
        return name if name.endswith(".service") and theirs != ours else None


def _cmdline(pid: int) -> list[str]:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return [word.decode(errors="surrogateescape") for word in words if word]


def upgrade(client: GatewayClient) -> models.Upgrade:
    """Have the gateway that `client` talks to replaced by a new process. FailedError tells why it was not; the
    old one serves on then."""
    before = client.info()
    process = _Process(before.pid)
    supervisor = process.supervisor()
    if supervisor is not None:
        return _by_supervisor(client, before, supervisor)
    unit = process.unit()
    if unit is not None:
        raise FailedError(
            f"The gateway belongs to systemd's {unit}; run `systemctl reload {unit}`, which calls this command "
            "from inside the unit."
        )
    return _by_ourselves(client, before, process)


def _by_supervisor(client: GatewayClient, before: models.GatewayInfo, supervisor: int) -> models.Upgrade:
    asked = time.time()
    os.kill(supervisor, signal.SIGHUP)

    def refusal() -> str | None:
        late = [event for event in client.events(limit=20) if event.at.timestamp() >= asked]
        return next((event.message for event in late if event.message.startswith("No upgrade")), None)

    return _await(client, before, refusal)


def _by_ourselves(client: GatewayClient, before: models.GatewayInfo, process: _Process) -> models.Upgrade:
    command = [sys.executable, "-P", "-m", "ringstone", *_successor(process.arguments())]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=process.directory(),
        start_new_session=True,
        text=True,
    )
    assert child.stderr is not None
    # It ends when the new process goes on in the old one's log, or dies.
    said = child.stderr.read().strip().splitlines()

    def refusal() -> str | None:
        code = child.poll()
        if code is None:
            return None
        last = said[-1].removeprefix("ringstone: ") if said else "it said nothing"
        return f"The new process ended with status {code}: {last}"

    report = _await(client, before, refusal)
    # It is nobody's child from here on, and is not to be waited for.
    child.returncode = 0
    return report


def _successor(arguments: Sequence[str]) -> list[str]:
    """The running gateway's own command line with --takeover, from the global options on."""
    words = list(arguments)
    at = words.index("gateway")
    begin = next((index for index, word in enumerate(words[:at]) if word == "--socket"), at)
    rest = [word for word in words[at + 1 :] if word not in ("--takeover", "--supervise")]
    return [*words[begin:at], "gateway", "--takeover", *rest]


def _await(
    client: GatewayClient, before: models.GatewayInfo, refusal: Callable[[], str | None]
) -> models.Upgrade:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        try:
            now = client.info()
            if now.pid != before.pid and now.upgrade is not None:
                return now.upgrade
            why = refusal()
        except (UnreachableError, StoppedError):
            # Between the two; the socket's backlog holds the next one.
            why = None
        if why is not None:
            raise FailedError(f"{why} The gateway that was there (process {before.pid}) goes on.")
        time.sleep(_LOOK_SECONDS)
    raise FailedError(
        f"No new process answered within {LIMIT_SECONDS:g} s; the gateway's events say what became of it "
        "(`ringstone status --events 20`)."
    )
