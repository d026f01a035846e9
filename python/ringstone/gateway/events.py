"""What happened: the engine's and the gateway's own log lines, kept for the API and written to the log."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Event:
    """`at_ns` is CLOCK_REALTIME; `level` is info, warning or error; `volume` is "" when none is concerned."""

    at_ns: int
    level: str
    volume: str
    message: str


class EventLog:
    """The latest events, oldest first. Safe from any thread."""

    def __init__(self, logger: str = "ringstone.gateway") -> None:
        self._log = logging.getLogger(logger)
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=_KEPT)

    def add(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
        prefix = f"volume {event.volume}: " if event.volume else ""
        self._log.log(_LEVELS.get(event.level, logging.ERROR), "%s%s", prefix, event.message)

    def say(self, level: str, message: str, *, volume: str = "") -> None:
        """Add an event of the gateway's own, as of now."""
        self.add(Event(time.time_ns(), level, volume, message))

    def latest(self, limit: int) -> list[Event]:
        with self._lock:
            return list(self._events)[-limit:] if limit > 0 else []
