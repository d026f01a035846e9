"""Volumes attached with `ha` are taken over by a living host when their own is dead.

Any number of managers may do this at once. Each take-over names the epoch that it replaces, and the new owner's gateway
claims the volume in one transaction, in which that is still the epoch and the old host still dead. So whoever is late
changes nothing. That the old host writes no more is not decided here but in the storage, when the new owner opens the
volume (ringstone.gateway.ownership).
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath

from ringstone import models
from ringstone.errors import BusyError, ExistsError, RingstoneError, UnreachableError
from ringstone.manager.operations import Operations
from ringstone.state import ALIVE, AttachmentRecord

log = logging.getLogger("ringstone.manager")

# A death is told by the store; this is for what comes without a change there, such as the end of the grace.
_ROUND_SECONDS = 1.0
# Between two attempts for a volume that no host would take.
_PAUSE_SECONDS = 5.0
_MOST_AT_ONCE = 8


class Failover:
    """Two threads, from start() to stop()."""

    def __init__(
        self, operations: Operations, grace_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._operations = operations
        self._grace_s = grace_s
        self._clock = clock
        # Since when a host is dead, as this manager has seen it without a gap.
        self._dead_since: dict[str, float] = {}
        # Volumes that are being taken over.
        self._busy: set[str] = set()
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, thread_name_prefix="take-over")
        # How often a volume was tried in vain, when it is tried again, and what was said of it last.
        self._attempts: Counter[str] = Counter()
        self._again_at: dict[str, float] = {}
        self._said: dict[str, dict[str, str]] = {}
        self._cut_off = False
        self._look = threading.Event()
        self._stopped = threading.Event()
        self._watch = operations.store.watch(ALIVE)
        self._threads = [
            threading.Thread(name=name, target=run, daemon=True)
            for name, run in (("failover", self._run), ("liveness", self._follow))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Waits for take-overs that have begun."""
        self._stopped.set()
        self._look.set()
        self._watch.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._pool.shutdown()

    def _follow(self) -> None:
        for _ in self._watch:
            self._look.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._look.clear()
            try:
                self.round()
            except Exception:
                log.exception("a round of failover")
            self._look.wait(_ROUND_SECONDS)

    def round(self) -> list[Future[None]]:
        """Look once, and begin to take over what is due. A volume that takes long is in no other's way."""
        try:
            due = self._due()
        except RingstoneError as error:
            # Nothing is known of the hosts now, so nobody's time as a dead one runs on.
            self._dead_since.clear()
            if not self._cut_off:
                self._say("error", f"Nothing is taken over for now: {error.message}")
            self._cut_off = True
            return []
        if self._cut_off:
            self._say("info", "The cluster's state is within reach again.")
            self._cut_off = False
        self._busy |= {held.volume for held in due}
        return [self._pool.submit(self._take_over, held) for held in due]

    def _due(self) -> list[AttachmentRecord]:
        store, now = self._operations.store, self._clock()
        alive = store.alive_hosts()
        dead = {host.name for host in store.hosts()} - alive
        for name in dead - self._dead_since.keys():
            self._dead_since[name] = now
        for name in self._dead_since.keys() - dead:
            del self._dead_since[name]
            if name in alive:
                self._say("info", f"Host {name} is back; what is still attached there stays.")
        due_hosts = {name for name, since in self._dead_since.items() if now - since >= self._grace_s}
        if not due_hosts:
            self._forget(set())
            return []
        shared = {pool.name for pool in store.pools() if pool.host is None}
        reached = {volume.name for volume in store.volumes() if volume.pool in shared}
        wanted = [
            one for one in store.attachments() if one.ha and one.host in due_hosts and one.volume in reached
        ]
        self._forget({one.volume for one in wanted})
        return [one for one in wanted if self._is_time(one.volume, now)]

    def _forget(self, wanted: set[str]) -> None:
        """What was said and tried of volumes that somebody has taken over meanwhile."""
        for name in (self._said.keys() | self._again_at.keys()) - wanted - self._busy:
            for known in (self._said, self._again_at, self._attempts):
                known.pop(name, None)

    def _is_time(self, volume: str, now: float) -> bool:
        return volume not in self._busy and self._again_at.get(volume, now) <= now

    def _take_over(self, held: AttachmentRecord) -> None:
        name = held.volume
        self._say_once(name, "warning", f"Host {held.host} is dead; another one takes the volume over.")
        try:
            taken = self._attach(held)
        except (ExistsError, BusyError) as error:
            # Somebody else was first, or the host is back. What is left to do, the next round sees.
            self._again(name)
            self._say_once(name, "info", f"Not taken over: {error.message}")
        except UnreachableError as error:
            self._again(name)
            self._say_once(name, "error", f"Not taken over yet: {error.message}")
        except Exception as error:
            self._again(name)
            reason = (
                error.message if isinstance(error, RingstoneError) else f"{type(error).__name__}: {error}"
            )
            self._say_once(name, "error", f"Not taken over: {reason} It is tried again.")
        else:
            self._attempts.pop(name, None)
            self._said.pop(name, None)
            self._say(
                "warning",
                f"Host {taken.host} took it over from {held.host}, in epoch {taken.epoch}; it is served at "
                f"{taken.socket}.",
                volume=name,
            )
        finally:
            self._busy.discard(name)

    def _attach(self, held: AttachmentRecord) -> models.Attachment:
        """On the least loaded host; after a failure there, on the next."""
        hosts = self._operations.hosts.by_load(frozenset({held.host}))
        first = self._attempts[held.volume] % max(1, len(hosts))
        return self._operations.attach_on_one_of(hosts[first:] + hosts[:first], request_of(held))

    def _again(self, volume: str) -> None:
        self._attempts[volume] += 1
        self._again_at[volume] = self._clock() + _PAUSE_SECONDS

    def _say(self, level: str, message: str, *, volume: str = "") -> None:
        self._operations.events.say(level, message, volume=volume)

    def _say_once(self, volume: str, level: str, message: str) -> None:
        """Not again while nothing else is said of the volume."""
        if self._said.setdefault(volume, {}).get(level) != message:
            self._said[volume][level] = message
            self._say(level, message, volume=volume)


def request_of(held: AttachmentRecord) -> models.AttachmentCreate:
    """The same attachment elsewhere. A socket at a place that was chosen stays there; the usual one follows its host's
    run directory."""
    path = PurePath(held.socket)
    usual = path.parent.name == "vhost" and path.name == f"{held.volume}.sock"
    return models.AttachmentCreate(
        volume=held.volume,
        socket=None if usual else held.socket,
        queues=held.queues,
        read_only=held.read_only,
        ha=True,
        take_over=True,
        failover_epoch=held.epoch,
        socket_owner=held.socket_owner,
        socket_group=held.socket_group,
        socket_mode=held.socket_mode,
    )
