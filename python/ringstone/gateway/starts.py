"""Starts that follow each other too soon: a gateway that crashes in a row slows itself down, whoever starts it.

A few crashes are served again at once, as guests wait. One that goes on to crash would only keep the host and its
log busy, so from the fourth start on each waits twice as long as the one before. <run dir>/starts is JSON:
{"count": starts in a row, "at": CLOCK_BOOTTIME seconds of the last}. A clean stop removes it, and 60 s of service
make it void.
"""

import json
import logging
import signal
import time
from pathlib import Path

from ringstone.gateway.notify import sd_notify
from ringstone.stopping import SIGNALS

log = logging.getLogger("ringstone.gateway")

_SOON_SECONDS = 60
_FREE_STARTS = 3
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 10.0
# Beyond the wait, for what a start takes.
_START_SECONDS = 60
# What ends a gateway in order.


class Starts:
    """The gateway's record of its own starts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def count(self) -> int:
        """Note a start; how many in a row it makes, 1 after a clean stop or after enough service."""
        before, at = self._read()
        now = _now()
        # A time to come is that of another boot of the host.
        count = before + 1 if 0 <= now - at < _SOON_SECONDS else 1
        self._write(count, now)
        return count

    def serving(self, count: int) -> None:
        """Service begins now, and counts from now on."""
        self._write(count, _now())

    def forget(self) -> None:
        """After a clean stop."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> tuple[int, float]:
        try:
            kept = json.loads(self._path.read_bytes())
            return int(kept["count"]), float(kept["at"])
        except (OSError, ValueError, KeyError, TypeError):
            # None yet, or cut off by a crash.
            return 0, float("-inf")

    def _write(self, count: int, at: float) -> None:
        whole = self._path.with_suffix(".new")
        try:
            whole.write_text(json.dumps({"count": count, "at": at}))
            whole.replace(self._path)
        except OSError as error:
            # Guests' disks do not depend on it.
            log.warning("%s cannot be written: %s.", self._path, error)


def wait_seconds(count: int) -> float:
    """How long start number `count` in a row waits."""
    if count <= _FREE_STARTS:
        return 0.0
    return min(_FIRST_WAIT_SECONDS * 2.0 ** min(count - _FREE_STARTS - 1, 10), _LONGEST_WAIT_SECONDS)


def hold_back(starts: Starts) -> bool:
    """Note a start, and wait if it is one too many. False when the gateway was told to stop meanwhile."""
    count = starts.count()
    seconds = wait_seconds(count)
    if not seconds:
        return True
    log.warning(
        "The gateway ended %d times in a row without a clean stop, each time within %d s; it waits %.1f s before it "
        "serves. The log before each start, `journalctl -u ringstone-gateway` or `coredumpctl` say why it ended.",
        count - 1,
        _SOON_SECONDS,
        seconds,
    )
    sd_notify(f"EXTEND_TIMEOUT_USEC={int((seconds + _START_SECONDS) * 1_000_000)}")
    if _told_to_stop(seconds):
        return False
    starts.serving(count)
    return True


def _told_to_stop(seconds: float) -> bool:
    """Wait for `seconds`, or for the signal that ends the gateway. No other thread may run yet."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return signal.sigtimedwait(SIGNALS, seconds) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
