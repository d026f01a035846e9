"""Telling the service manager how the gateway is doing: sd_notify(3) and its watchdog."""

import logging
import os
import socket

log = logging.getLogger("ringstone.gateway")

# A manager whose queue is full does not read; unix(7) would have us wait for it without end.
_PATIENCE_SECONDS = 5.0


def sd_notify(state: str) -> None:
    """Send `state` ("READY=1") to the service manager, if there is one. One that does not listen or
    read is only worth a line in the log: guests' disks do not depend on it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        # The abstract namespace: unix(7).
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_PATIENCE_SECONDS)
        try:
            sender.connect(address)
            sender.sendall(state.encode())
        except OSError as error:
            log.warning("The service manager at NOTIFY_SOCKET does not take %s: %s.", state, error)


def watchdog_address() -> tuple[str, int] | None:
    """Where signs of life go, and the milliseconds between two, half of what the service manager allows:
    sd_watchdog_enabled(3). None when it wants none."""
    address = os.environ.get("NOTIFY_SOCKET")
    allowed = os.environ.get("WATCHDOG_USEC")
    if not address or not allowed or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return address, max(1, int(allowed) // 2000)
