"""Telling the service manager how the gateway is doing: sd_notify(3) and its watchdog."""

import logging
import os
import socket
import threading

from ringstone.stats import StatsPage

log = logging.getLogger("ringstone.gateway")


def sd_notify(state: str) -> None:
    """Send `state` ("READY=1") to the service manager, if there is one. One that does not listen is only
    worth a line in the log: guests' disks do not depend on it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        # The abstract namespace: unix(7).
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall(state.encode())
        except OSError as error:
            log.warning("The service manager at NOTIFY_SOCKET does not take %s: %s.", state, error)


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of what the service manager allows: sd_watchdog_enabled(3)."""
    allowed = os.environ.get("WATCHDOG_USEC")
    if not allowed or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(allowed) / 2_000_000


class Watchdog(threading.Thread):
    """Signs of life for as long as every reactor that polls also turns.

    It watches the reactors and not the control API: a slow API must never cost a guest its disk, but a
    reactor that is stuck already has.
    """

    def __init__(self, stats: StatsPage, interval: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._stats = stats
        self._interval = interval
        self._stopping = threading.Event()
        self._turns: list[tuple[str, int]] = []

    def alive(self) -> bool:
        """Whether every reactor has turned, or slept, since the last call."""
        now = [(reactor.state, reactor.turns) for reactor in self._stats.read().reactors]
        stuck = any(new == old and new[0] == "polling" for old, new in zip(self._turns, now, strict=False))
        self._turns = now
        return not stuck

    def run(self) -> None:
        while not self._stopping.wait(self._interval):
            if self.alive():
                sd_notify("WATCHDOG=1")

    def stop(self) -> None:
        self._stopping.set()
        self.join()
