"""Attachments, reactors and what a start brings back. Pools and volumes have files of their own."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ringstone.errors import BusyError, ExistsError, FailedError, InvalidError, NotFoundError, RingstoneError
from ringstone.gateway import checks, ownership
from ringstone.gateway.boots import Boots
from ringstone.gateway.engine import EngineAttachment, EnginePort, EngineVolume
from ringstone.gateway.events import EventLog
from ringstone.gateway.locks import NamedLocks
from ringstone.gateway.pools import Pools
from ringstone.gateway.rights import UNSAID, SocketRights
from ringstone.gateway.sockets import Sockets
from ringstone.gateway.space import SpaceWatch
from ringstone.gateway.undo import undoing
from ringstone.gateway.volumes import Volumes
from ringstone.pools import SharedPool
from ringstone.state import LOCAL_HOST, AttachmentRecord, Store, VolumeRecord
from ringstone.state.settings import is_away, refuse_away

_MOST_DEFAULT_QUEUES = 4
# Less than a successor waits for an answer (20 s).
_FREEZE_SECONDS = 15.0
# Between two rounds of wait_for_backings(): I/O in flight takes milliseconds, or something is wrong.
_FIRST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.2

log = logging.getLogger("ringstone.gateway")


class Service:
    """Every method may be called from any thread, blocks until done, and raises errors of
    ringstone.errors."""

    def __init__(
        self,
        store: Store,
        engine: EnginePort,
        events: EventLog,
        *,
        run_dir: Path,
        state_dir: Path,
        reactors: int,
        host: str = LOCAL_HOST,
        allow_test_pools: bool = False,
        socket_dirs: Sequence[Path] = (),
        socket_rights: SocketRights = UNSAID,
    ) -> None:
        """`host`: the name of this one; what belongs to another is left alone. `socket_dirs`: where sockets may be,
        beside `vhost` in `run_dir`; `socket_rights`: who may connect to those whose attachment does not say it."""
        self.store = store
        self.engine = engine
        self.events = events
        self.host = host
        self.sockets = Sockets(run_dir / "vhost", socket_dirs, socket_rights)
        self._default_queues = min(_MOST_DEFAULT_QUEUES, max(1, reactors))
        self._boots = Boots(state_dir / "boot")
        self.locks = NamedLocks()
        self.pools = Pools(
            store,
            events,
            self.locks,
            host=host,
            directory=state_dir / "pools",
            allow_test_pools=allow_test_pools,
        )
        self.space = SpaceWatch(store, self.pools, events)
        self.volumes = Volumes(
            store, engine, events, self.locks, self.pools, host=host, unfinished=state_dir / "unfinished"
        )
        # Of the volumes that the engine serves, the epoch in which this host owns them.
        self._epochs: dict[str, int] = {}
        # Volumes whose guests are to move here, and those whose guests may come back as they move elsewhere: with where
        # they are listened for. The store says who owns them.
        self._incoming: dict[str, AttachmentRecord] = {}
        # Attachments of the store that the engine does not serve, with the reason.
        self._failed_attachments: dict[str, str] = {}
        # Of them, those whose backing was in use.
        self._waiting: dict[str, AttachmentRecord] = {}
        # Of what this host owns, what the storage has shut out and is not served again yet.
        self._shut_out: set[str] = set()

    def refuse_other_host(self, name: str | None) -> None:
        """InvalidError unless it is this one's, or None."""
        if name not in (None, self.host):
            raise InvalidError(
                f"This is host {self.host!r}, not {name!r}; ask that one, or a manager with --manager."
            )

    # attachments

    def attach(
        self,
        name: str,
        *,
        socket: str | None = None,
        queues: int | None = None,
        read_only: bool = False,
        ha: bool = False,
        take_over: bool = False,
        failover_epoch: int | None = None,
        incoming: bool = False,
        rights: SocketRights = UNSAID,
    ) -> AttachmentRecord:
        """Serve a volume at `socket`. An attachment that failed earlier is replaced. With `take_over`, also one of
        another host, which is shut out first; with `failover_epoch` only while that is the volume's epoch and its
        owner's host dead. `ha`: another host may take it over when this one is dead. `incoming`: only listen, for a
        guest that is to move here, until a call with `take_over` makes this host the owner. `rights`: who
        may connect."""
        checks.check_name("volume", name)
        path = self.sockets.place(name, socket)
        with self.locks.hold(f"volume {name}"):
            volume = self.volumes.usable(name)
            self.pools.reach(volume.pool)
            record = AttachmentRecord(
                name, str(path), queues or self._default_queues, read_only, time.time_ns(), self.host, ha=ha
            )
            record = rights.on(record)
            self.sockets.ids(record)
            if incoming:
                return self._expect(volume, record)
            if name in self._incoming:
                # The guest that comes is connected there.
                expected = self._incoming[name]
                held = self.store.attachment(name)
                if held is not None and held.host == self.host:
                    # Nobody has owned it since it was released.
                    self._serve(volume, held)
                    return held
                record = replace(
                    expected, created_ns=record.created_ns, host=self.host, ha=ha, read_only=False
                )
            with undoing(self.events, volume=name) as undo_later:
                record, take_back = self._record_attachment(record, take_over, failover_epoch)
                undo_later("the attachment's row", take_back)
                self._serve(volume, record)
            self.events.say("info", f"Attached at {record.socket}.", volume=name)
            return record

    def _record_attachment(
        self, record: AttachmentRecord, take_over: bool, failover_epoch: int | None
    ) -> tuple[AttachmentRecord, Callable[[], None]]:
        """Claim the volume, or change its attachment here where that failed earlier: that owner goes on. Returns the
        record with its epoch, and what takes it back."""
        name = record.volume
        reason = self._failed_attachments.get(name)

        def write() -> tuple[AttachmentRecord, AttachmentRecord | None, AttachmentRecord | None]:
            held = self.store.attachment(name)
            if failover_epoch is not None:
                ownership.refuse_late_failover(self.store, name, held, failover_epoch)
            failed = held if reason is not None else None
            if failed is None or failed.host != self.host:
                taken = take_over and held is not None and held.host != self.host
                client = ownership.successor_of(held) if taken and held is not None else {}
                claim = self.store.claim(replace(record, client=client), take_over=taken)
                return claim.attachment, None, claim.previous
            changed = replace(record, epoch=failed.epoch, client=failed.client)
            self.store.set_attachment(changed)
            return changed, failed, None

        written, failed, previous = self.store.transact(write)
        self._failed_attachments.pop(name, None)

        def take_back() -> None:
            if previous is not None:
                ownership.give_back(self.store, previous, written)
                return
            if failed is None or reason is None:
                self.store.remove_attachment(name, written.epoch)
                return
            self.store.set_attachment(failed)
            self._failed_attachments[name] = reason

        return written, take_back

    def _expect(self, volume: VolumeRecord, record: AttachmentRecord) -> AttachmentRecord:
        """Listen for the guest of a volume that another host owns. Nothing of that is in the store, and a restart ends
        it: the guest has not left its host yet."""
        pool = self.pools.reach(volume.pool)
        held = self.store.attachment(volume.name)
        if not isinstance(pool, SharedPool) or held is None or held.host == self.host or record.read_only:
            raise InvalidError(
                f"Volume {volume.name!r} is not attached on another host, for writing and in a pool that both reach, "
                "so no guest moves in with it; leave incoming out."
            )
        if volume.name in self._incoming:
            raise ExistsError(f"Volume {volume.name!r} waits for its guest already.")
        record = replace(record, epoch=held.epoch, queues=held.queues)
        pool.check_backing(volume)
        rights = self.sockets.ids(record)
        self.sockets.prepare(Path(record.socket))
        self.volumes.open(volume, pool, pool.incoming_backend(volume), read_only=False)
        with undoing(self.events, volume=volume.name) as undo_later:
            undo_later("opening the volume", lambda: self.engine.close_volume(volume.name))
            self.engine.attach(volume.name, record.socket, queues=record.queues, rights=rights)
        self._incoming[volume.name] = record
        self.events.say(
            "info", f"Waits for its guest from host {held.host}, at {record.socket}.", volume=volume.name
        )
        return record

    def release(self, name: str) -> AttachmentRecord:
        """Let another host own a volume whose guest moves there and stands still. Until it is detached here its
        frontend stays connected: the guest goes on here if it cannot move, when this host owns the volume again.
        BusyError while the guest runs."""
        with self.locks.hold(f"volume {name}"):
            volume, record = self.volumes.usable(name), self.store.attachment(name)
            if record is None or self._epochs.get(name) is None or self.has_lost(name, record):
                raise InvalidError(
                    f"Volume {name!r} is not served on host {self.host!r}; release it where it is."
                )
            refuse_away(self.store)
            if not isinstance(self.pools.reach(volume.pool), SharedPool) or record.read_only:
                raise InvalidError(
                    f"Volume {name!r} is read-only, or in a pool of this host alone; no other can own it."
                )
            self.engine.release_volume(name)
            del self._epochs[name]
            self._incoming[name] = record
            self.events.say("info", "Released, as its guest moves to another host.", volume=name)
            return record

    def is_incoming(self, name: str) -> bool:
        """Whether it is listened for here and not served, as another host owns it or is about to."""
        return name in self._incoming

    def _end_incoming(self, name: str, *, force: bool) -> None:
        if self._served(name):
            self.engine.detach(name, force=force)
        self.volumes.close(name)
        del self._incoming[name]
        self.events.say("info", "Waits for its guest no more.", volume=name)

    def _own_incoming(self, volume: VolumeRecord, record: AttachmentRecord, pool: SharedPool) -> None:
        """The guest that was waited for is stopped on its host: from here on this one owns the volume."""
        opened = self.volumes.opened(volume.name)
        if opened is None or opened.client != pool.client():
            raise BusyError(
                f"The cluster has shut out the connection over which volume {volume.name!r} waits for its guest; "
                "detach it on this host, and begin anew."
            )
        self.engine.own_volume(volume.name, ownership.owned_backend(self.store, pool, volume, record))
        del self._incoming[volume.name]
        self._epochs[volume.name] = record.epoch
        ownership.note_owner(self.store, pool, record)
        if volume.size > opened.size:
            self.engine.resize_volume(volume.name, volume.size)

    def _serve(self, volume: VolumeRecord, record: AttachmentRecord) -> None:
        """Open the volume in the engine and listen; all or nothing."""
        pool = self.pools.reach(volume.pool)
        pool.check_backing(volume)
        if volume.name in self._incoming and isinstance(pool, SharedPool):
            return self._own_incoming(volume, record, pool)
        rights = self.sockets.ids(record)
        self.sockets.prepare(Path(record.socket))
        owned = isinstance(pool, SharedPool) and not record.read_only
        backend = (
            ownership.owned_backend(self.store, pool, volume, record)
            if isinstance(pool, SharedPool) and owned
            else pool.backend(volume)
        )
        self.volumes.open(volume, pool, backend, read_only=record.read_only)
        with undoing(self.events, volume=volume.name) as undo_later:
            undo_later("opening the volume", lambda: self.engine.close_volume(volume.name))
            if isinstance(pool, SharedPool) and owned:
                ownership.note_owner(self.store, pool, record)
            self.engine.attach(volume.name, record.socket, queues=record.queues, rights=rights)
            self._epochs[volume.name] = record.epoch
            self._shut_out.discard(volume.name)

    def detach(self, name: str, *, force: bool = False) -> None:
        """BusyError while a frontend is connected, unless `force`."""
        with self.locks.hold(f"volume {name}"):
            self.store.volume(name)
            record = self.store.attachment(name)
            refuse_away(self.store)
            if name in self._incoming:
                self._end_incoming(name, force=force)
                if record is None or record.host != self.host:
                    return
            if record is None:
                raise NotFoundError(f"Volume {name!r} is not attached; there is nothing to detach.")
            if record.host != self.host:
                raise InvalidError(
                    f"Volume {name!r} is attached on host {record.host!r} and this is {self.host!r}; detach it on that "
                    "host."
                )
            epoch = self._epochs.pop(name, None)
            try:
                if self._served(name):
                    self.engine.detach(name, force=force)
            except RingstoneError:
                if epoch is not None:
                    self._epochs[name] = epoch
                raise
            self.volumes.close(name)
            self.store.remove_attachment(name, record.epoch)
            self._failed_attachments.pop(name, None)
            self.events.say("info", "Detached.", volume=name)

    def served(self) -> list[str]:
        """Volumes that this host owns and serves."""
        return list(self._epochs)

    def has_lost(self, name: str, record: AttachmentRecord | None) -> bool:
        """Whether a volume is served here though its attachment is `record`, another one's or none. News may be late:
        what is of an epoch before ours is no loss."""
        epoch = self._epochs.get(name)
        if epoch is None or record is None:
            return epoch is not None
        return record.epoch > epoch or (record.epoch == epoch and record.host != self.host)

    def give_up(self, name: str, record: AttachmentRecord | None) -> None:
        """The attachment of a volume is `record` now, and not ours any more: its I/O stops at once, before anything
        that might wait, and then everything of it is let go of."""
        epoch = self._epochs.get(name)
        if not self.has_lost(name, record) or (record is None and self._owns_still(name, epoch)):
            return
        owner = f"host {record.host!r} owns it since epoch {record.epoch}" if record else "nobody owns it"
        opened = self.volumes.opened(name)
        if opened is not None:
            self.engine.fence_volume(name)
        self.events.say(
            "error", f"It is not served here any more: {owner}, and this host had epoch {epoch}.", volume=name
        )
        with self.locks.hold(f"volume {name}"):
            if self._epochs.get(name) != epoch:
                return
            del self._epochs[name]
            if opened is not None:
                self._drop(opened)

    def _owns_still(self, name: str, epoch: int | None) -> bool:
        """Whether the store says so now. That nobody owns a volume has no epoch, so it may be news of before this host
        attached it; and as nobody else writes then, there is the time to ask. Without an answer the news stands."""
        try:
            held = self.store.attachment(name)
        except RingstoneError:
            return False
        return held is not None and (held.host, held.epoch) == (self.host, epoch)

    def is_idle(self, name: str, record: AttachmentRecord | None) -> bool:
        """Whether `record` is this host's, and nothing has come of it yet."""
        if record is None or record.host != self.host:
            return False
        # What was released waits for its next owner; what is given back after that is so in a later epoch.
        released = self._incoming.get(name)
        known = name in self._epochs or name in self._failed_attachments
        return not known and (released is None or released.epoch < record.epoch)

    def take_up(
        self, name: str, why: str = "Another host could not take it over; it is this one's again."
    ) -> None:
        """Serve what is this host's and is not served."""
        with self.locks.hold(f"volume {name}"):
            record = self.store.attachment(name)
            if record is not None and self.is_idle(name, record):
                self.events.say("warning", why, volume=name)
                self._restore_attachment(self.store.volume(name), record)

    def take_back_fenced(self) -> None:
        """Serve again what the storage has shut out though this host still owns it: the connection that its volumes
        shared was shut out for the sake of another one. Guests reconnect, and what they wait for is done again. What
        cannot be served yet is tried anew at the next call."""
        for opened in self.engine.volumes():
            if opened.fenced:
                with self.locks.hold(f"volume {opened.name}"):
                    self._close_fenced(opened)
        for name in list(self._shut_out):
            with self.locks.hold(f"volume {name}"):
                self._take_back(name)

    def _close_fenced(self, opened: EngineVolume) -> None:
        name = opened.name
        record = self.store.attachment(name)
        if record is None or self._epochs.get(name) is None or self.has_lost(name, record):
            return
        self.events.say(
            "warning", "The cluster has shut this host's connection out; making a new one.", volume=name
        )
        self._drop(opened)
        self._shut_out.add(name)

    def _take_back(self, name: str) -> None:
        record = self.store.attachment(name)
        if record is None or self._epochs.get(name) is None or self.has_lost(name, record):
            self._shut_out.discard(name)
            return
        serve = partial(self._serve, self.store.volume(name), record)
        reason = self._attempt("It is not served yet", name, serve)
        if reason is not None:
            self._failed_attachments[name] = reason
            return
        self._failed_attachments.pop(name, None)

    def _drop(self, opened: EngineVolume) -> None:
        """Close what the storage has shut out, or may have. Nothing new shares its connection."""
        volume = self.store.volume(opened.name)
        pool = self.pools.reach(volume.pool)
        if isinstance(pool, SharedPool) and opened.client is not None:
            pool.retire(opened.client)
        if self._served(opened.name):
            self.engine.detach(opened.name, force=True)
        self.engine.close_volume(opened.name)

    def share(self, name: str, shared: bool) -> AttachmentRecord:
        """Let a second frontend connect beside the first, for a live migration, or end that; it does not outlive
        the gateway. BusyError when it is to end while two are connected."""
        with self.locks.hold(f"volume {name}"):
            self.store.volume(name)
            record = self.store.attachment(name)
            if record is None:
                raise NotFoundError(
                    f"Volume {name!r} is not attached; run `ringstone volume attach {name}` first."
                )
            reason = self._failed_attachments.get(name)
            if reason is not None:
                raise FailedError(f"Volume {name!r} is attached but not served: {reason}")
            self.engine.share(name, shared)
            said = "A second frontend may connect, for a migration." if shared else "For one frontend again."
            self.events.say("info", said, volume=name)
            return record

    def _served(self, name: str) -> EngineAttachment | None:
        return next((one for one in self.engine.attachments() if one.volume == name), None)

    def attachment_failure(self, volume: str) -> str | None:
        """Why the volume's attachment is not served; None when it is."""
        return self._failed_attachments.get(volume)

    # reactors

    def reactors(self) -> dict[int, int]:
        """Core by index."""
        return self.engine.reactors()

    def reactor_cores(self) -> list[int]:
        return list(self.reactors().values())

    def add_reactor(self, core: int) -> None:
        """Until the gateway ends; its configuration says what it starts with."""
        with self.locks.hold("reactors"):
            self.engine.add_reactor(core)
            self.events.say("info", f"Added a reactor on CPU {core}.")

    def remove_reactor(self, core: int) -> None:
        """Its queues move to the others first. BusyError for the last one."""
        with self.locks.hold("reactors"):
            self.engine.remove_reactor(core)
            self.events.say("info", f"Removed the reactor on CPU {core}.")

    def move_queue(self, name: str, queue: int, core: int) -> None:
        """It arrives when its requests in flight are done."""
        with self.locks.hold(f"volume {name}"):
            self.store.volume(name)
            self.engine.move_queue(name, queue, core)

    # upgrade

    def frozen(self) -> AbstractContextManager[None]:
        """Nothing of this is changed inside; whoever tries gets a BusyError. So does whoever asks
        for it, while a change takes too long."""
        return self.locks.frozen("The gateway is being upgraded; try again in a moment.", _FREEZE_SECONDS)

    def adopt(self) -> None:
        """After a takeover the engine serves already: what it does not, though the store wants it, is tried
        anew."""
        served = {attachment.volume for attachment in self.engine.attachments()}
        volumes = {volume.name: volume for volume in self.store.volumes()}
        for record in self._own_attachments():
            if record.volume not in served:
                self._restore_attachment(volumes[record.volume], record)
                continue
            self._epochs[record.volume] = record.epoch
            pool = self.pools.reach(volumes[record.volume].pool)
            if isinstance(pool, SharedPool) and not record.read_only:
                ownership.note_owner(self.store, pool, record)

    # start

    def restore(self) -> None:
        """Bring back what the store knows. What cannot be brought back is reported as an event and left
        failed; a backing that somebody else has in use is left to wait_for_backings()."""
        self.restore_volumes()
        volumes = {volume.name: volume for volume in self.store.volumes()}
        for record in self._own_attachments():
            self._restore_attachment(volumes[record.volume], record)

    def restore_volumes(self) -> None:
        """Finish or undo what was interrupted, and bring back what a boot of the host has taken."""
        # Of what every host reaches, another one may be making or deleting a volume just now.
        own = {pool.name for pool in self.store.pools() if pool.host == self.host}
        new_boot, whole = self._boots.is_new(), True
        if not is_away(self.store):
            self._finish()
        for volume in self.store.volumes():
            if volume.pool in own:
                restore = partial(self.volumes.restore, volume, new_boot=new_boot)
                whole &= self._attempt("The volume is not usable", volume.name, restore) is None
        if new_boot and whole and not is_away(self.store):
            self._boots.note()

    def _finish(self) -> None:
        """What a gateway of this host was making or deleting when it died."""
        for finish_all in (self.pools.finish, self.volumes.finish_reverts):
            self._attempt("What was interrupted is not finished", "", finish_all)
        for volume, forget in self.volumes.unfinished():
            finish = partial(self.volumes.restore, volume, new_boot=False)
            if self._attempt("It is half made or half deleted", volume.name, finish) is None:
                forget()

    def _own_attachments(self) -> list[AttachmentRecord]:
        return [record for record in self.store.attachments() if record.host == self.host]

    def _restore_attachment(self, volume: VolumeRecord, record: AttachmentRecord) -> None:
        serve = partial(self._serve, volume, record)
        reason = self._attempt("The volume is not served", record.volume, serve, wait=True)
        if reason is not None:
            self._failed_attachments[record.volume] = reason

    @property
    def waits_for_backings(self) -> bool:
        """Whether restore() left attachments to wait_for_backings()."""
        return bool(self._waiting)

    def wait_for_backings(self, seconds: float, stop: threading.Event) -> None:
        """Serve the attachments whose backings were in use when restore() tried, in rounds, until all are
        served, `seconds` have passed or `stop` is set. Those that never came are reported and left failed.

        A gateway that was killed goes on to exist until the kernel has finished the I/O that was in flight;
        until then the kernel keeps its locks on files and its exclusive claims on block devices. So waiting
        for the lock is exactly what keeps a late write of the dead process from landing after a newer one of
        ours: the retry is not politeness, and taking the lock by force would lose acknowledged writes.
        """
        for name in self._waiting:
            self.events.say(
                "warning",
                f"Its backing is still in use, by a gateway that has just ended or by somebody else; trying "
                f"again for up to {seconds:g} s.",
                volume=name,
            )
        begun = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        while self._waiting and not stop.wait(pause):
            late = time.monotonic() - begun >= seconds
            for name, record in list(self._waiting.items()):
                self._retry(name, record, begun, last=late)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _retry(self, name: str, record: AttachmentRecord, begun: float, *, last: bool) -> None:
        with self.locks.hold(f"volume {name}"):
            if name not in self._failed_attachments or self.store.attachment(name) != record:
                # A person has attached it anew or detached it meanwhile.
                self._waiting.pop(name, None)
                return
            serve = partial(self._serve, self.store.volume(name), record)
            reason = self._attempt("The volume is not served", name, serve, wait=not last)
            if reason is None:
                del self._failed_attachments[name]
                waited = time.monotonic() - begun
                self.events.say(
                    "info", f"Served after {waited:.2f} s of waiting for its backing.", volume=name
                )
            else:
                self._failed_attachments[name] = reason

    def _attempt(
        self, failure: str, volume: str, step: Callable[[], None], *, wait: bool = False
    ) -> str | None:
        """Run `step`; what it raises becomes an event, so that one volume never stops the others. The reason,
        or None. With `wait`, a volume whose backing is in use is noted as waiting instead."""
        self._waiting.pop(volume, None)
        try:
            step()
        except BusyError as error:
            reason = error.message
            record = self.store.attachment(volume) if wait else None
            if record is not None:
                self._waiting[volume] = record
                return reason
        except RingstoneError as error:
            reason = error.message
        except Exception as error:
            log.exception("volume %s", volume)
            reason = f"{type(error).__name__}: {error}. The gateway's log has the details."
        else:
            return None
        self.events.say("error", f"{failure}: {reason}", volume=volume)
        return reason
