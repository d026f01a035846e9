"""Live migration of a VM whose disks are volumes: the two QEMUs over QMP, and what becomes of the disks between them
(ringstone.hypervisor.disks).

At no moment may both QEMUs run the guest: the source is never resumed before the destination has been ended, and never
when the migration may have completed.

Protocol: docs/devel/migration and qapi/migration.json of QEMU; the capability `events` has each change of state
told, so that nothing is polled.
"""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from qemu.qmp import ExecuteError, QMPError

from ringstone.errors import RingstoneError
from ringstone.hypervisor.disks import Disks
from ringstone.hypervisor.qmp import QmpSession
from ringstone.hypervisor.versions import TRACKS_TCG_PAGES

# What QMP raises when QEMU has gone or does not answer.
_GONE = (QMPError, EOFError, OSError, TimeoutError)
_ENDED = ("completed", "failed", "cancelled")
# Plenty for a local socket; QEMU's own default of 128 MiB/s would hold a large guest up.
_BYTES_PER_SECOND = 10 << 30
_DOWNTIME_MS = 300
_CANCEL_SECONDS = 30.0
# 64 pages; see TRACKS_TCG_PAGES.
_SCANNED_AT_ONCE = 256 << 10

Report = Callable[[str], None]


class MigrationError(RingstoneError):
    """The migration did not happen, or not to its end; the message says what was rolled back and what is left."""


# One QEMU.


def prepare(qmp: QmpSession) -> None:
    """Have QEMU tell each change of a migration's state, and the destination tell the source whether it could take the
    guest: without a return path the source is done when it has sent it. On both ends, before it begins."""
    capabilities = [{"capability": name, "state": True} for name in ("events", "return-path")]
    qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})


def listen(qmp: QmpSession, uri: str) -> None:
    """Have a destination that was started with -incoming defer wait at `uri`."""
    qmp.execute("migrate-incoming", {"uri": uri})


def start(
    qmp: QmpSession,
    uri: str,
    *,
    bytes_per_second: int = _BYTES_PER_SECOND,
    downtime_ms: int = _DOWNTIME_MS,
) -> None:
    """Begin to send the guest to `uri`. `downtime_ms`: how long it may stand still at the end."""
    limits = {"max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms}
    qmp.execute("migrate-set-parameters", limits)
    qmp.forget_events()
    qmp.execute("migrate", {"uri": uri})


def wait(qmp: QmpSession, *, timeout_s: float) -> None:
    """Until the migration has completed, on either end. MigrationError with QEMU's reason when it failed or was
    cancelled, TimeoutError when it goes on."""
    deadline = time.monotonic() + timeout_s
    status = status_of(qmp)
    while status not in _ENDED:
        status = qmp.wait_event({"MIGRATION"}, timeout_s=deadline - time.monotonic()).data["status"]
    if status != "completed":
        raise MigrationError(f"The migration {status}: {reason_of(qmp)}.")


def cancel(qmp: QmpSession) -> bool:
    """Stop a migration; whether it is stopped, False when it had completed before."""
    qmp.execute("migrate_cancel")
    try:
        wait(qmp, timeout_s=_CANCEL_SECONDS)
    except MigrationError:
        return True
    return False


def status_of(qmp: QmpSession) -> str:
    """QEMU's word: none, setup, active, completed, failed, cancelled and some between."""
    return str(_query(qmp, "query-migrate").get("status", "none"))


def reason_of(qmp: QmpSession) -> str:
    """Why it failed, in QEMU's words."""
    return str(_query(qmp, "query-migrate").get("error-desc", "QEMU gives no reason, its own log may"))


def run_state(qmp: QmpSession) -> str:
    """QEMU's word: running, paused, inmigrate, postmigrate and others."""
    return str(_query(qmp, "query-status")["status"])


def check_pages_are_tracked(qmp: QmpSession) -> None:
    """MigrationError when the source is an emulated guest (TCG) of a QEMU that would leave some of its memory behind,
    see ringstone.hypervisor.args.memory_args."""
    version = qmp.version()
    if _query(qmp, "query-kvm")["enabled"] or TRACKS_TCG_PAGES(version):
        return
    backends = qmp.execute("query-memdev")
    assert isinstance(backends, list)
    sizes = [
        _query(qmp, "query-memory-size-summary")["base-memory"],
        *(backend["size"] for backend in backends),
    ]
    if any(size % _SCANNED_AT_ONCE == 0 for size in sizes):
        raise MigrationError(
            f"QEMU {version} loses memory of an emulated guest (TCG) that it migrates, and "
            "the guest would crash or see wrong data. Start it under KVM, with QEMU 9.0 or newer, or with 8 KiB more "
            "of memory than a multiple of 256 KiB (-m and its memory object, 524296K say, at both ends)"
        )


def _query(qmp: QmpSession, command: str) -> dict[str, Any]:
    answer = qmp.execute(command)
    assert isinstance(answer, dict)
    return answer


# The whole.


@dataclass(slots=True)
class _Move:
    """One migration with all that belongs to it. `done` says, in words for a person, what was rolled back."""

    disks: Disks
    source: QmpSession
    open_destination: Callable[[], AbstractContextManager[QmpSession]]
    uri: str
    timeout_s: float
    report: Report
    stack: contextlib.ExitStack
    destination: QmpSession | None = None
    listening: bool = False
    sending: bool = False
    done: list[str] = field(default_factory=list)

    def go(self) -> None:
        if (state := run_state(self.source)) != "running":
            raise MigrationError(f"The source's guest is in state {state}, not running.")
        check_pages_are_tracked(self.source)
        self.report(self.disks.prepare())
        # Only now: a destination whose disk nobody lets in does not get as far as answering.
        self.destination = self.stack.enter_context(self.open_destination())
        if (state := run_state(self.destination)) != "inmigrate":
            raise MigrationError(f"The destination is in state {state}; start it with -incoming defer.")
        prepare(self.source)
        prepare(self.destination)
        listen(self.destination, self.uri)
        self.listening = True
        try:
            self.sending = True
            start(self.source, self.uri)
        except ExecuteError:
            # Refused. Whatever else happens, it may be on its way.
            self.sending = False
            raise
        self.report("The guest is on its way.")
        self._wait()
        wait(self.destination, timeout_s=_CANCEL_SECONDS)
        self.disks.switch()
        self.report("The guest runs at the destination.")

    def _wait(self) -> None:
        try:
            wait(self.source, timeout_s=self.timeout_s)
        except TimeoutError as error:
            # It may complete while it is being cancelled, and has then moved.
            if cancel(self.source):
                raise MigrationError(
                    f"The migration did not complete within {self.timeout_s:g} s: the guest writes its memory "
                    "faster than it is sent, or the destination does not read."
                ) from error

    # When it fails.

    def roll_back(self) -> None:
        """The source goes on as before, if that is safe."""
        if self.sending and not self._stop_sending():
            return
        if self.listening and self.destination is not None:
            # It can be told to listen once only, and it must be gone before the source may run.
            _end(self.destination)
            self.done.append("the destination's QEMU was ended")
        if self.sending:
            self._resume_source()
        self.done += self.disks.take_back()

    def _stop_sending(self) -> bool:
        """False when the guest has moved, or when nobody can tell."""
        try:
            if status_of(self.source) not in _ENDED:
                cancel(self.source)
            status = status_of(self.source)
        except _GONE as error:
            self.done.append(
                f"nothing was rolled back, as the source does not answer ({error}): find out which QEMU runs the guest "
                "before you resume either"
            )
            return False
        if status == "completed":
            self.done.append(
                "nothing was rolled back, as the guest has left the source: look at the destination, and do not resume "
                "the source while the destination runs"
            )
            return False
        self.done.append("the migration was stopped")
        return True

    def _resume_source(self) -> None:
        try:
            if run_state(self.source) != "running":
                self.source.execute("cont")
                self.done.append("the source was resumed")
            else:
                self.done.append("the source runs on")
        except _GONE as error:
            self.done.append(f"the source could not be resumed ({error}): resume it with `cont`")


def migrate_vm(
    disks: Disks,
    *,
    source: QmpSession,
    open_destination: Callable[[], AbstractContextManager[QmpSession]],
    uri: str,
    keep_source: bool = False,
    timeout_s: float = 600,
    report: Report = lambda _: None,
) -> list[str]:
    """Move the guest of `source` to the QEMU that `open_destination` gives, which was started with -incoming defer and
    the same disks; it is called once they let it connect. `uri`, unix:/PATH say, is where the two meet. Then the source
    is ended, or left paused with `keep_source`.

    Returns what is left for a person to do. MigrationError when the guest could not be moved.
    """
    with contextlib.ExitStack() as stack:
        move = _Move(disks, source, open_destination, uri, timeout_s, report, stack)
        _go_or_roll_back(move)
    if keep_source:
        return disks.keep()
    _end(source)
    report("The source's QEMU was ended.")
    return disks.finish()


def _go_or_roll_back(move: _Move) -> None:
    try:
        move.go()
    except BaseException as error:
        move.roll_back()
        if not isinstance(error, (RingstoneError, *_GONE)):
            raise
        told = str(error) or type(error).__name__
        rolled_back = "; ".join(move.done) or "nothing had been changed"
        raise MigrationError(f"{told.rstrip('.')}. Rolled back: {rolled_back}.") from error


def _end(qmp: QmpSession) -> None:
    """QEMU's end; it may have ended already."""
    with contextlib.suppress(*_GONE):
        qmp.execute("quit")
