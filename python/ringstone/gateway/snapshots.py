"""Snapshots, clones and what is done with them, for volumes whose pool's medium has them."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from ringstone.errors import BusyError, InvalidError, UnsupportedError
from ringstone.gateway import checks
from ringstone.gateway.service import Service
from ringstone.gateway.undo import undoing
from ringstone.pools import Deletion, LayerPool, Pool, Snapshot, SnapshotPool
from ringstone.state import VolumeRecord, VolumeState


class Snapshots:
    """Over the service, whose locks it shares. Every method blocks on the medium."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def _pool(self, volume: VolumeRecord) -> SnapshotPool:
        pool: Pool = self._service.pools.reach(volume.pool)
        if not isinstance(pool, SnapshotPool):
            raise UnsupportedError(
                f"Volume {volume.name!r} is in a {pool.record.type} pool, which has no snapshots; use a store or rbd "
                "pool for volumes that need them."
            )
        return pool

    def _layers(self, volume: VolumeRecord, what: str) -> LayerPool:
        """UnsupportedError says that `what` is not for its pool."""
        pool = self._pool(volume)
        if not isinstance(pool, LayerPool):
            raise UnsupportedError(
                f"Volume {volume.name!r} is in an {self._service.store.pool(volume.pool).type} pool, and {what} only "
                "in store pools. Make a snapshot of each by itself, and clone that."
            )
        return pool

    @contextmanager
    def _held(self, *volumes: str) -> Iterator[None]:
        """All of them, in an order that nobody who holds several can cross."""
        with ExitStack() as stack:
            for name in sorted(set(volumes)):
                stack.enter_context(self._service.locks.hold(f"volume {name}"))
            yield

    def list(self, name: str) -> list[Snapshot]:
        """Oldest first."""
        volume = self._service.volumes.usable(name)
        return self._pool(volume).snapshots(volume)

    def create(self, name: str, snapshot: str, also: Sequence[str] = ()) -> Snapshot:
        """It holds every write that was acknowledged before; the volume may be attached. `also`: further volumes, of
        the same pool, that get one of that name at the same point. The first volume's."""
        checks.check_name("snapshot", snapshot)
        with self._held(name, *also):
            volume = self._service.volumes.usable(name)
            pool = self._pool(volume)
            if also:
                self._create_group(volume, [self._service.volumes.usable(one) for one in also], snapshot)
            else:
                pool.create_snapshot(volume, snapshot)
            for one in dict.fromkeys((name, *also)):
                self._service.events.say("info", f"Made snapshot {snapshot}.", volume=one)
            return next(one for one in pool.snapshots(volume) if one.name == snapshot)

    def _create_group(self, volume: VolumeRecord, others: Sequence[VolumeRecord], snapshot: str) -> None:
        pool = self._layers(volume, "several volumes have a snapshot at one point")
        for other in others:
            if other.pool != volume.pool:
                raise InvalidError(
                    f"Volume {other.name!r} is in pool {other.pool!r} and {volume.name!r} in {volume.pool!r}; only "
                    "volumes of one pool can have a snapshot at one point."
                )
        pool.create_group_snapshot([volume, *others], snapshot)

    def delete(self, name: str, snapshot: str) -> None:
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            self._pool(volume).remove_snapshot(volume, snapshot)
            self._service.events.say("info", f"Deleted snapshot {snapshot}.", volume=name)

    def deletions(self, name: str) -> Sequence[Deletion]:
        """Deleted snapshots that have blocks still."""
        volume = self._service.volumes.usable(name)
        pool = self._pool(volume)
        # Where the medium deletes at once there are none.
        return pool.deletions(volume) if isinstance(pool, LayerPool) else []

    def keep(self, name: str, snapshot: str) -> Snapshot:
        """Take a deletion back. BusyError when blocks of the snapshot are given up."""
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            pool = self._layers(volume, "deletions are taken back")
            pool.keep_snapshot(volume, snapshot)
            self._service.events.say("info", f"Took the deletion of snapshot {snapshot} back.", volume=name)
            return next(one for one in pool.snapshots(volume) if one.name == snapshot)

    def reclaimable(self, name: str) -> dict[str, int | None]:
        """What deleting each snapshot, alone, would free."""
        volume = self._service.volumes.usable(name)
        return self._layers(volume, "what a snapshot's deletion frees is known").reclaimable(volume)

    def revert(self, name: str, snapshot: str) -> None:
        """The volume gets the snapshot's content. BusyError while it is attached: a guest would not notice."""
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            if self._service.store.attachment(name) is not None:
                raise BusyError(
                    f"Volume {name!r} is attached, and its guest would not notice that its blocks change; run "
                    f"`ringstone volume detach {name}` first."
                )
            self._service.volumes.revert(self._pool(volume), volume, snapshot)
            self._service.events.say("info", f"Reverted to snapshot {snapshot}.", volume=name)

    def clone(self, parent: str, snapshot: str | None, name: str) -> VolumeRecord:
        """Make volume `name` of a snapshot, or of what `parent` holds now (None), in the same pool and of the same
        size; it is there at once."""
        checks.check_name("volume", name)
        service = self._service
        # What is cloned of a running volume must be of the size that it has.
        with self._held(name, *([parent] if snapshot is None else [])):
            origin = service.volumes.usable(parent)
            pool = service.pools.reach(origin.pool)
            size, make = self._clone_of(origin, snapshot)
            volume = VolumeRecord(
                name,
                str(uuid.uuid4()),
                origin.pool,
                size,
                origin.block_size,
                VolumeState.CREATING,
                time.time_ns(),
            )

            def add() -> None:
                others = service.store.volumes(origin.pool)
                service.store.add_volume(volume)
                pool.admit(size, others, new=True)
                pool.refuse_foreign(volume)

            with service.volumes.noted(pool, volume), undoing(service.events, volume=name) as undo_later:
                service.store.transact(add)
                undo_later("making the volume", lambda: service.store.remove_volume(name))
                make(volume)
                service.store.set_volume_state(name, VolumeState.READY)
            of = f"volume {parent}" if snapshot is None else f"snapshot {parent}@{snapshot}"
            service.events.say("info", f"Made of {of}.", volume=name)
            return replace(volume, state=VolumeState.READY)

    def _clone_of(
        self, origin: VolumeRecord, snapshot: str | None
    ) -> tuple[int, Callable[[VolumeRecord], None]]:
        """The clone's size, and what makes its backing."""
        if snapshot is None:
            layers = self._layers(origin, "what a volume holds now is cloned")
            return origin.size, partial(layers.clone_running, origin)
        pool = self._pool(origin)
        found = next((one for one in pool.snapshots(origin) if one.name == snapshot), None)
        return found.size if found is not None else origin.size, partial(pool.clone_backing, origin, snapshot)

    def flatten(self, name: str) -> None:
        """Copy what the clone still reads from its parent, so that it stands alone."""
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            self._pool(volume).flatten(volume)
            self._service.events.say("info", "Flattened: it has no parent any more.", volume=name)

    def diff(self, name: str, since: str | None, until: str | None) -> Sequence[tuple[int, int]]:
        """Where the volume's content at snapshot `until` (None: now) may differ from that at `since` (None: from
        nothing): offset and length in bytes, in ascending order."""
        volume = self._service.volumes.usable(name)
        return self._layers(volume, "what has changed is known").diff(volume, since, until)
