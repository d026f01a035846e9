"""This host among the others of a cluster: it says that it is there, and hears of volumes that it has lost.

Both are for people and for who takes over; neither is what keeps two hosts from writing one volume. That is the storage
(ringstone.gateway.ownership), which does not depend on anybody's clock.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import time_ns

from ringstone.errors import RingstoneError
from ringstone.gateway.service import Service
from ringstone.state import AttachmentRecord, HostRecord
from ringstone.state.records import ATTACHMENTS, LEASE_SECONDS

log = logging.getLogger("ringstone.gateway")


class Membership:
    """Two threads until stop(): one from start() on, the other one from follow() on."""

    def __init__(
        self,
        service: Service,
        host: HostRecord,
        *,
        lease_s: int = LEASE_SECONDS,
        rejoin: Callable[[], None] | None = None,
    ) -> None:
        """`rejoin`: where the state is away, called until it has come back; nothing is announced before."""
        self._rejoin = rejoin
        self._service = service
        self._host = host
        self._lease_s = lease_s
        self._stop = threading.Event()
        # Volumes that are being let go of: a change of owner is told in several steps.
        self._giving_up: set[str] = set()
        self._watch = service.store.watch(ATTACHMENTS)
        self._threads = [
            threading.Thread(name=name, target=run, daemon=True)
            for name, run in (("announce", self._announce), ("ownership", self._follow))
        ]

    def start(self, *, serving: bool = False) -> None:
        """Raises what the first announcement does: another machine may have this host's name. While guests are served
        already, that is only told."""
        if self._rejoin is None and serving:
            reason = self._attempt(self._say)
            if reason is not None:
                self._service.events.say("warning", f"This host was not announced: {reason}")
        elif self._rejoin is None:
            self._say()
        self._threads[0].start()

    def follow(self) -> None:
        """Once what this host has is served: from then on it lets go of what others have taken over."""
        self._threads[1].start()

    def stop(self) -> None:
        self._stop.set()
        self._watch.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _say(self) -> None:
        cores = tuple(self._service.reactor_cores())
        free = max(0, len(self._host.cores) + self._host.free_cores - len(cores))
        now = replace(self._host, cores=cores, free_cores=free, seen_ns=time_ns())
        self._service.store.announce(now, self._lease_s)

    def _announce(self) -> None:
        trouble: str | None = None
        while not self._stop.wait(self._lease_s / 3):
            now = (
                self._attempt(self._come_back)
                or self._attempt(self._say)
                or self._attempt(self._service.take_back_fenced)
            )
            if now is not None and now != trouble:
                self._service.events.say(
                    "warning", f"{now} What is attached is served all the same; nothing can be changed."
                )
            if now is None and trouble is not None:
                self._service.events.say("info", "The cluster's state is within reach again.")
            trouble = now

    def _come_back(self) -> None:
        if self._rejoin is not None:
            self._rejoin()
            self._rejoin = None

    def _attempt(self, step: Callable[[], object]) -> str | None:
        """The reason why `step` failed."""
        try:
            step()
        except RingstoneError as error:
            return error.message
        except Exception as error:
            log.exception("the host's announcement")
            return f"{type(error).__name__}: {error}."
        return None

    def _follow(self) -> None:
        for change in self._watch:
            if change.key not in self._giving_up and self._service.has_lost(change.key, change.record):
                self._giving_up.add(change.key)
                # What is in flight may take long to come back, and the next volume must not wait for it.
                give_up = partial(self._give_up, change.key, change.record)
                threading.Thread(name="give-up", target=give_up, daemon=True).start()
            elif change.key not in self._giving_up and self._service.is_idle(change.key, change.record):
                take_up = partial(self._take_up, change.key)
                threading.Thread(name="take-up", target=take_up, daemon=True).start()

    def _give_up(self, volume: str, record: AttachmentRecord | None) -> None:
        reason = self._attempt(partial(self._service.give_up, volume, record))
        if reason is not None:
            self._service.events.say("error", f"Letting go of it failed: {reason}", volume=volume)
        self._giving_up.discard(volume)
        # It may have been given back meanwhile.
        self._take_up(volume)

    def _take_up(self, volume: str) -> None:
        reason = self._attempt(partial(self._service.take_up, volume))
        if reason is not None:
            self._service.events.say("error", f"Serving it again failed: {reason}", volume=volume)
