"""Snapshots, clones and what is done with them, for volumes whose pool's medium has them."""

import time
import uuid
from dataclasses import replace

from ringstone.errors import BusyError, UnsupportedError
from ringstone.gateway import checks
from ringstone.gateway.service import Service
from ringstone.gateway.undo import undoing
from ringstone.pools import Pool, Snapshot, SnapshotPool
from ringstone.state import VolumeRecord, VolumeState


class Snapshots:
    """Over the service, whose locks it shares. Every method blocks on the medium."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def _pool(self, volume: VolumeRecord) -> SnapshotPool:
        pool: Pool = self._service.pools.reach(volume.pool)
        if not isinstance(pool, SnapshotPool):
            raise UnsupportedError(
                f"Volume {volume.name!r} is in a {pool.record.type} pool, which has no snapshots; use an rbd pool for "
                "volumes that need them."
            )
        return pool

    def list(self, name: str) -> list[Snapshot]:
        """Oldest first."""
        volume = self._service.volumes.usable(name)
        return self._pool(volume).snapshots(volume)

    def create(self, name: str, snapshot: str) -> Snapshot:
        """It holds every write that was acknowledged before; the volume may be attached."""
        checks.check_name("snapshot", snapshot)
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            pool = self._pool(volume)
            pool.create_snapshot(volume, snapshot)
            self._service.events.say("info", f"Made snapshot {snapshot}.", volume=name)
            return next(one for one in pool.snapshots(volume) if one.name == snapshot)

    def delete(self, name: str, snapshot: str) -> None:
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            self._pool(volume).remove_snapshot(volume, snapshot)
            self._service.events.say("info", f"Deleted snapshot {snapshot}.", volume=name)

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

    def clone(self, parent: str, snapshot: str, name: str) -> VolumeRecord:
        """Make volume `name` of a snapshot, in the same pool and of the same size; it is there at once."""
        checks.check_name("volume", name)
        service = self._service
        with service.locks.hold(f"volume {name}"):
            origin = service.volumes.usable(parent)
            pool = self._pool(origin)
            found = next((one for one in pool.snapshots(origin) if one.name == snapshot), None)
            size = found.size if found is not None else origin.size
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
                service.pools.reach(origin.pool).admit(size, others, new=True)

            with (
                service.volumes.noted(service.pools.reach(origin.pool), volume),
                undoing(service.events, volume=name) as undo_later,
            ):
                service.store.transact(add)
                undo_later("making the volume", lambda: service.store.remove_volume(name))
                pool.clone_backing(origin, snapshot, volume)
                service.store.set_volume_state(name, VolumeState.READY)
            service.events.say("info", f"Made of snapshot {parent}@{snapshot}.", volume=name)
            return replace(volume, state=VolumeState.READY)

    def flatten(self, name: str) -> None:
        """Copy what the clone still reads from its parent, so that it stands alone."""
        with self._service.locks.hold(f"volume {name}"):
            volume = self._service.volumes.usable(name)
            self._pool(volume).flatten(volume)
            self._service.events.say("info", "Flattened: it has no parent any more.", volume=name)
