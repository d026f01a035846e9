"""The logic of volumes over the store, the pools and the engine: made, grown, deleted, opened.

The order of the steps keeps the store ahead of the disk: a volume's row is written in state `creating` or
`deleting` before its backing is touched, so that whatever interrupts the gateway, restore() finds the rest
and cleans it up. The engine has a volume open only while it is attached.
"""

import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ringstone.errors import BusyError, InvalidError, NoDeviceError, NotFoundError, RingstoneError
from ringstone.gateway import checks
from ringstone.gateway.engine import EnginePort, EngineVolume
from ringstone.gateway.events import EventLog
from ringstone.gateway.locks import NamedLocks
from ringstone.gateway.pools import Pools
from ringstone.gateway.undo import undoing
from ringstone.gateway.unfinished import Unfinished
from ringstone.pools import UNSEALED, LayerPool, Pool, Sealed, SharedPool, SnapshotPool, open_pool
from ringstone.state import Store, VolumeRecord, VolumeState
from ringstone.state.records import VOLUMES, JsonValue
from ringstone.units import format_size


class Volumes:
    """Every method may be called from any thread, blocks until done, and raises errors of ringstone.errors."""

    def __init__(
        self,
        store: Store,
        engine: EnginePort,
        events: EventLog,
        locks: NamedLocks,
        pools: Pools,
        *,
        host: str,
        unfinished: Path,
    ) -> None:
        """`unfinished`: where what is being made or deleted in a cluster is noted."""
        self._unfinished = Unfinished(unfinished, VOLUMES)
        self._reverts = unfinished / "reverts"
        self._store = store
        self._engine = engine
        self._events = events
        self._locks = locks
        self._pools = pools
        self._host = host

    def create(
        self,
        name: str,
        pool_name: str,
        size: int | None,
        block_size: int,
        *,
        sealed: Sealed = UNSEALED,
    ) -> VolumeRecord:
        checks.check_name("volume", name)
        checks.check_block_size(block_size)
        # The pool's key stays the same meanwhile.
        keyed = self._locks.hold(f"pool {pool_name}") if sealed.encryption else nullcontext()
        with self._locks.hold(f"volume {name}"), keyed:
            pool = self._pools.reach(pool_name)
            pool.check()
            make = self._maker(pool, sealed)
            if size is None:
                size = self._natural_size(pool, block_size)
            checks.check_size(size, block_size)
            volume = VolumeRecord(
                name, str(uuid.uuid4()), pool_name, size, block_size, VolumeState.CREATING, time.time_ns()
            )
            made = False

            def take_back() -> None:
                # A row whose backing cannot be removed stays, so that the deletion can be repeated.
                self._store.set_volume_state(name, VolumeState.DELETING)
                self.close(name)
                if made:
                    pool.remove_backing(volume)
                self._store.remove_volume(name)

            def add() -> None:
                others = self._store.volumes(pool_name)
                # The row comes first, so that a taken name is told before a full pool.
                self._store.add_volume(volume)
                pool.admit(volume.size, others, new=True)
                pool.refuse_foreign(volume)

            with self.noted(pool, volume), undoing(self._events, volume=name) as undo_later:
                self._store.transact(add)
                undo_later("making the volume", take_back)
                make(volume)
                made = True
                self.open(volume, pool, pool.backend(volume), read_only=False)
                self._engine.close_volume(name)
                self._store.set_volume_state(name, VolumeState.READY)
            self._events.say("info", f"Made in pool {pool_name} with {format_size(size)}.", volume=name)
            return replace(volume, state=VolumeState.READY)

    def _maker(self, pool: Pool, sealed: Sealed) -> Callable[[VolumeRecord], None]:
        if sealed == UNSEALED:
            return pool.create_backing
        if not isinstance(pool, LayerPool):
            what = "encrypts nothing" if sealed.encryption else "keeps no checksums"
            raise InvalidError(
                f"Pool {pool.record.name!r} is of type {pool.record.type}, which {what}; use a pool of type store, or "
                f"make the volume without {'encryption' if sealed.encryption else 'integrity'}."
            )
        return partial(pool.create_sealed, integrity=sealed.integrity, encryption=sealed.encryption)

    def _natural_size(self, pool: Pool, block_size: int) -> int:
        size = pool.default_size()
        if size is None:
            raise InvalidError(
                "A volume needs a size, for example 10G; only one on a block device has its own."
            )
        return size // block_size * block_size

    def open(
        self, volume: VolumeRecord, pool: Pool, backend: dict[str, JsonValue], *, read_only: bool
    ) -> None:
        self._engine.open_volume(
            volume.name,
            backend,
            size=volume.size,
            block_size=volume.block_size,
            read_only=read_only,
            serial=volume.serial,
            key=pool.key(volume) if isinstance(pool, LayerPool) else None,
        )

    def opened(self, name: str) -> EngineVolume | None:
        return next((volume for volume in self._engine.volumes() if volume.name == name), None)

    def close(self, name: str) -> None:
        """Whether or not the engine has it open."""
        if self.opened(name) is not None:
            self._engine.close_volume(name)

    def resize(self, name: str, size: int) -> VolumeRecord:
        """Grow a volume, attached or not; a running guest is told.

        The backing grows before the state says so: whoever is killed in between leaves a volume of its former size on a
        backing that is longer, which the next growth uses.
        """
        with self._locks.hold(f"volume {name}"):
            volume = self.usable(name)
            checks.check_size(size, volume.block_size)
            checks.check_growth(name, volume.size, size)
            pool = self._pools.reach(volume.pool)
            pool.check_backing(volume)

            def admit() -> None:
                held = self._store.attachment(name)
                if held is not None and held.host != self._host:
                    raise InvalidError(
                        f"Volume {name!r} is attached on host {held.host!r} and this is {self._host!r}; grow it on "
                        "that host, or through a manager, so that its guest is told."
                    )
                pool.admit(size - volume.size, self._store.volumes(volume.pool), new=False)

            def commit() -> None:
                # Others may have taken the room meanwhile.
                admit()
                self._store.set_volume_size(name, size)

            def cut_back() -> None:
                # A commit whose answer was lost may have taken effect: never cut what the state says is there.
                if self._store.volume(name).size == volume.size:
                    pool.resize_backing(volume, volume.size)

            with undoing(self._events, volume=name) as undo_later:
                self._store.transact(admit)
                undo_later("the backing's size", cut_back)
                pool.resize_backing(volume, size)
                self._store.transact(commit)
                undo_later("the volume's size", lambda: self._store.set_volume_size(name, volume.size))
                if any(one.volume == name for one in self._engine.attachments()):
                    self._engine.resize_volume(name, size)
            self._events.say("info", f"Grown to {format_size(size)}.", volume=name)
            return replace(volume, size=size)

    def delete(self, name: str) -> None:
        """BusyError while attached, or while something stands on it: it is as before then. After another failure the
        volume stays in state `deleting`, and may be deleted again."""
        with self._locks.hold(f"volume {name}"):
            volume = self._store.volume(name)
            pool = self._pools.reach(volume.pool)

            def mark() -> None:
                if self._store.attachment(name) is not None:
                    raise BusyError(
                        f"Volume {name!r} is attached; run `ringstone volume detach {name}` first."
                    )
                self._store.set_volume_state(name, VolumeState.DELETING)

            if volume.state is VolumeState.READY:
                _refuse_snapshots(pool, volume)
            with self.noted(pool, volume):
                self._store.transact(mark)
                try:
                    pool.remove_backing(volume)
                except BusyError:
                    # Nothing of it is gone. What an earlier attempt has left of a volume stays half deleted.
                    if volume.state is VolumeState.READY:
                        self._store.set_volume_state(name, VolumeState.READY)
                    raise
                self._store.remove_volume(name)
            self._events.say("info", "Deleted.", volume=name)

    def noted(self, pool: Pool, volume: VolumeRecord) -> AbstractContextManager[None]:
        """While it is made or deleted."""
        return self._unfinished.noted(volume) if isinstance(pool, SharedPool) else nullcontext()

    def unfinished(self) -> list[tuple[VolumeRecord, Callable[[], None]]]:
        """Volumes in clusters that a gateway of this host was making or deleting when it died, as they are now, and
        what forgets each."""
        found = []
        known = {volume.name: volume for volume in self._store.volumes()}
        for noted, forget in self._unfinished.left():
            now = known.get(noted.name)
            if now is None or now.id != noted.id or now.state is VolumeState.READY:
                forget()
            else:
                found.append((now, forget))
        return found

    def revert(self, pool: SnapshotPool, volume: VolumeRecord, snapshot: str) -> None:
        """The volume gets the snapshot's content, and keeps its size, which it may have only since."""
        # An image whose content is put back object by object is neither before the last of them.
        with Unfinished(self._reverts / snapshot, VOLUMES).noted(volume):
            self._revert(pool, volume, snapshot)

    def _revert(self, pool: SnapshotPool, volume: VolumeRecord, snapshot: str) -> None:
        pool.revert(volume, snapshot)
        self._pools.reach(volume.pool).resize_backing(volume, volume.size)

    def finish_reverts(self) -> None:
        """Those that a gateway of this host was at when it died. A volume that had an owner since is left alone: what
        it holds is its guest's."""
        known = {volume.name: volume for volume in self._store.volumes()}
        for directory in sorted(self._reverts.glob("*")):
            for noted, forget in Unfinished(directory, VOLUMES).left():
                volume = known.get(noted.name)
                if volume is not None and volume.id == noted.id:
                    owned = volume.epoch != noted.epoch or self._store.attachment(volume.name) is not None
                    self._finish_revert(volume, directory.name, owned=owned)
                forget()

    def _finish_revert(self, volume: VolumeRecord, snapshot: str, *, owned: bool) -> None:
        told = f"Going back to snapshot {snapshot} was interrupted"
        pool = open_pool(self._store.pool(volume.pool))
        try:
            if owned or not isinstance(pool, SnapshotPool):
                raise BusyError("it has been attached since")
            self._revert(pool, volume, snapshot)
        except RingstoneError as error:
            mixed = "what is there may be of before and behind it."
            self._events.say("error", f"{told} and cannot be finished ({error}); {mixed}", volume=volume.name)
            return
        self._events.say("warning", f"{told} and has been finished.", volume=volume.name)

    def usable(self, name: str) -> VolumeRecord:
        volume = self._store.volume(name)
        if volume.state is VolumeState.DELETING:
            raise BusyError(f"Volume {name!r} is half deleted; run `ringstone volume delete {name}` again.")
        if volume.state is VolumeState.CREATING:
            raise BusyError(f"Volume {name!r} is still being made; wait a moment and try again.")
        return volume

    def failure(self, volume: VolumeRecord, pool: Pool) -> str | None:
        """Why the volume, which is in `pool`, cannot be used now; None when it can."""
        if volume.state is not VolumeState.READY:
            return None
        try:
            # What is in a cluster is not asked for at every look: it takes long, and for ever when OSDs are away.
            if pool.record.host == self._host:
                pool.check_backing(volume)
        except RingstoneError as error:
            return error.message
        return None

    def restore(self, volume: VolumeRecord, *, new_boot: bool) -> None:
        """Finish or undo what was interrupted. `new_boot` as for Pool.restore_backing()."""
        pool = open_pool(self._store.pool(volume.pool))
        if volume.state is VolumeState.READY:
            notice = pool.restore_backing(volume, new_boot=new_boot)
            if notice is not None:
                self._events.say("warning", notice, volume=volume.name)
            return
        pool.remove_backing(volume)
        self._store.remove_volume(volume.name)
        self._events.say(
            "warning",
            "Making the volume was interrupted and has been undone; make it again if it is wanted."
            if volume.state is VolumeState.CREATING
            else "Deleting the volume was interrupted and has been finished.",
            volume=volume.name,
        )


def _refuse_snapshots(pool: Pool, volume: VolumeRecord) -> None:
    """BusyError when it has some, which says what to do about them; the medium itself would refuse as well."""
    if not isinstance(pool, SnapshotPool):
        return
    with suppress(NoDeviceError, NotFoundError):
        if names := [snapshot.name for snapshot in pool.snapshots(volume)]:
            raise BusyError(
                f"Volume {volume.name!r} has snapshots ({', '.join(names)}); run `ringstone snapshot delete "
                f"{volume.name} {names[0]}` first."
            )
