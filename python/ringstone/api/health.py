"""The health of a server, which answers though everything else hangs: the look has a thread of its own, and whoever
asks waits only so long for it."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from fastapi import Request

from ringstone.models import Health

HEALTH_PATH = "/v1/health"
# Longer than a look takes that waits for one host of a cluster.
_WAIT_SECONDS = 15.0


class HealthLook:
    """One look at a time, for all who ask meanwhile."""

    def __init__(self, look: Callable[[], Health], *, wait_seconds: float = _WAIT_SECONDS) -> None:
        self._look = look
        self._wait_seconds = wait_seconds
        self._lock = threading.Lock()
        self._running: Future[Health] | None = None
        self._since = 0.0

    async def health(self) -> Health:
        found = asyncio.wrap_future(self._begun())
        done, _ = await asyncio.wait({found}, timeout=self._wait_seconds)
        if done:
            return found.result()
        seconds = time.monotonic() - self._since
        reason = (
            f"The look at pools, volumes and hosts has not come back for {seconds:.0f} s: storage, or the state, "
            "hangs. What is attached to other storage is served."
        )
        return Health(status="degraded", reasons=[reason])

    def _begun(self) -> Future[Health]:
        with self._lock:
            if self._running is None:
                self._running = Future()
                # So that nobody who stops waiting ends it for the others.
                self._running.set_running_or_notify_cancel()
                self._since = time.monotonic()
                # A daemon: a look that hangs does not keep the process from its end.
                threading.Thread(name="health", target=self._run, args=(self._running,), daemon=True).start()
            return self._running

    def _run(self, found: "Future[Health]") -> None:
        try:
            health = self._look()
        except BaseException as error:
            self._done()
            found.set_exception(error)
        else:
            self._done()
            found.set_result(health)

    def _done(self) -> None:
        with self._lock:
            self._running = None


async def health_of(request: Request) -> Health:
    """By the HealthLook of the application."""
    look = request.app.state.health
    assert isinstance(look, HealthLook)
    return await look.health()
