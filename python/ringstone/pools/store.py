"""The store pool: volumes in our own format on one block device or preallocated file, with snapshots and clones.

A pool is the store with the uuid that it got when it was made, not whatever is at its path: devices change their names.
"""

import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ringstone.errors import (
    BusyError,
    DeniedError,
    ExistsError,
    FailedError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    NotFoundError,
    RingstoneError,
    error_of_os,
)
from ringstone.pools import occupancy, store_door, store_options
from ringstone.pools.base import (
    Deletion,
    KeySource,
    Scrub,
    Sealed,
    Snapshot,
    Space,
    Usage,
    admit_to_capacity,
)
from ringstone.pools.directory import sync
from ringstone.pools.keys import KEYS, KINDS, MAKE_ONE
from ringstone.pools.store_door import OpenStore, StoredVolume
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord
from ringstone.units import format_size

# Where the two superblocks are: docs/formats/store.md.
_SUPERBLOCKS = (0, 512 << 10)
_BLOCK = 4096
# A gateway that was killed has its store open until the kernel has finished its I/O.
_PASSING_SECONDS = 5.0


def placed(record: PoolRecord, directory: Path) -> PoolRecord:
    """The record of a pool that is about to be made, in `directory` where nobody chose a path. Option `managed`: its
    file is not there yet; `replaces`: the store that is there, and is not the pool's."""
    path = record.path
    if path is None:
        path = str(directory / f"{record.name}.store")
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise error_of_os(error, f"making {directory}", "Choose a --path.") from error
    options = {**record.options}
    if not os.path.lexists(path):
        options["managed"] = True
    elif (found := _uuid_at(path)) is not None:
        options["replaces"] = found
    return replace(record, path=path, options=options)


def _uuid_at(path: str) -> str | None:
    """Of the store there; None where there is none, nor a drive that could have one."""
    found = occupancy.medium(path)
    return store_door.look(path) if found and found.startswith(("device ", "file ")) else None


class StorePool:
    """Implements ringstone.pools.Pool, SnapshotPool, LayerPool and DrivePool. Options: those of store_options, `uuid`
    of its store, and `managed` (the file was made with it)."""

    def __init__(self, record: PoolRecord) -> None:
        if record.path is None or not os.path.isabs(record.path):
            raise InvalidError(
                f"Store pool {record.name!r} needs the absolute path of a block device or file."
            )
        self.record = record
        self._path = record.path
        self._options = store_options.of(record)
        self._opened: OpenStore | None = None
        self._listed: dict[str, StoredVolume] | RingstoneError | None = None
        self._asked: tuple[str, StoredVolume | None] | None = None

    # made and gone

    def prepare(self, *, erase: bool = False) -> None:
        """Makes the store. Nothing is erased where this fails but for the drive's own fault."""
        if self._options.key is not None:
            KEYS.read(self._options.key)
        size = self._options.size
        if occupancy.medium(self._path) is None:
            uuid = self._make_file(size)
        else:
            if size is not None:
                raise InvalidError(
                    f"{self._path} is there already, and a store takes all of it; leave the size out."
                )
            self._take(erase)
            uuid = store_door.format_store(self._path, size=None, extent=self._options.extent)
        options = {
            name: value for name, value in self.record.options.items() if name not in store_options.WHILE_MADE
        }
        self.record = replace(self.record, options={**options, "uuid": uuid})

    def _make_file(self, size: int | None) -> str:
        path = Path(self._path)
        if not path.parent.is_dir() or (path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm")):
            raise NoDeviceError(
                f"The device or file {path} of pool {self.record.name!r} is not there. Check the path, `lsblk`, and "
                f"that the filesystem of {path.parent} is mounted."
            )
        if size is None:
            raise InvalidError(
                f"There is no {path} yet, and a new file needs a size, for example --size 100G; only a device has its "
                "own."
            )
        # One that fails leaves no file.
        uuid = store_door.format_store(self._path, size=size, extent=self._options.extent)
        self._sync_name()
        return uuid

    def _sync_name(self) -> None:
        """Have the drive know that the file is there, or gone."""
        parent = Path(self._path).parent
        try:
            sync(parent)
        except OSError as error:
            raise error_of_os(error, f"syncing {parent}", "Check its filesystem.") from error

    def _take(self, erase: bool) -> None:
        """What is at the path is for the store from here on."""
        try:
            if self._is_device():
                with occupancy.claimed(self._path) as fd:
                    self._empty(fd, erase)
                return
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._empty(fd, erase)
                # A file with holes could not keep what the store promises.
                os.posix_fallocate(fd, 0, max(os.fstat(fd).st_size, 1))
            finally:
                os.close(fd)
        except OSError as error:
            raise error_of_os(error, f"looking at {self._path}", "Check the device or file.") from error

    def _empty(self, fd: int, erase: bool) -> None:
        occupancy.refuse_users(self._path)
        there = _uuid_at(self._path)
        held = f"a Ringstone store ({there})" if there else occupancy.content(self._path)
        if held is None:
            return
        if not erase:
            raise ExistsError(
                f"{self._path} is not empty: it holds {held}. A store on it erases that. Name another device or file, "
                "or say that its content may be lost (--yes, or `erase` in the API)."
            )
        # A signature that stays, such as the backup of a partition table, would have others take the drive for that.
        occupancy.clear(fd)

    def discard(self) -> None:
        found = _uuid_at(self._path)
        if not self._is_own(found):
            return
        if found is not None:
            self._close()
        try:
            if found is not None:
                self._wipe()
            if self.record.options.get("managed"):
                Path(self._path).unlink(missing_ok=True)
                sync(Path(self._path).parent)
        except OSError as error:
            raise error_of_os(
                error, f"removing the store {self._path}", "Check the device or file."
            ) from error

    def _is_own(self, found: str | None) -> bool:
        """Whether `found` at the path is what prepare() made, perhaps in a process that died there."""
        options = self.record.options
        if found is None:
            return bool(options.get("managed"))
        uuid = options.get("uuid")
        return found == uuid if uuid is not None else found != options.get("replaces")

    def _close(self) -> None:
        with suppress(FailedError, InvalidError, NoDeviceError):
            # One that is damaged is not open.
            self._door(patient=True).close()

    def _wipe(self) -> None:
        exclusive = os.O_EXCL if self._is_device() else 0
        fd = os.open(self._path, os.O_RDWR | exclusive | os.O_CLOEXEC)
        try:
            for place in _SUPERBLOCKS:
                os.pwrite(fd, bytes(_BLOCK), place)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _is_device(self) -> bool:
        mode = os.stat(self._path).st_mode
        if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
            raise NoDeviceError(f"{self._path} is neither a block device nor a file; name one of those.")
        return stat.S_ISBLK(mode)

    # the store

    def _door(self, *, patient: bool = False) -> OpenStore:
        """`patient`: wait a moment for a gateway that has just ended."""
        end = time.monotonic() + (_PASSING_SECONDS if patient else 0)
        while self._opened is None:
            self._refuse_other_store()
            try:
                self._opened = OpenStore(self._path)
            except BusyError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.05)
        return self._opened

    def _refuse_other_store(self) -> None:
        name, uuid = self.record.name, self.record.options.get("uuid")
        if occupancy.medium(self._path) is None:
            raise NoDeviceError(
                f"The drive {self._path} of pool {name!r} is not there. Check the path and the cabling, or `lsblk`."
            )
        found = _uuid_at(self._path)
        if uuid is None or found == uuid:
            return
        if found is None:
            raise FailedError(
                f"There is no store at {self._path}, and pool {name!r} had one there ({uuid}). Check that it is the "
                "right drive; what was overwritten is to be restored from a backup."
            )
        raise FailedError(
            f"The store at {self._path} ({found}) is not that of pool {name!r} ({uuid}). Devices change their names: "
            "`lsblk` shows which is which; a path below /dev/disk/by-id stays."
        )

    def _changing(self, *, patient: bool = False) -> OpenStore:
        self._listed = self._asked = None
        return self._door(patient=patient)

    def _volumes(self) -> dict[str, StoredVolume]:
        # Kept for as long as this object, which serves one call of the API: a list of volumes asks for each. So is a
        # failure, as a store that is damaged takes long to say so.
        if self._listed is None:
            try:
                self._listed = {volume.name: volume for volume in self._door().volumes()}
            except RingstoneError as error:
                self._listed = error
        if isinstance(self._listed, RingstoneError):
            raise self._listed
        return self._listed

    def _look_for(self, name: str) -> StoredVolume | None:
        """Who is about one volume asks for that: at a gateway's start each of many does. Who comes with a second
        one has a list of them."""
        if self._listed is None and self._asked is None:
            try:
                self._asked = name, self._door().volume(name)
            except RingstoneError as error:
                self._listed = error
        if self._listed is None and self._asked is not None and self._asked[0] == name:
            return self._asked[1]
        return self._volumes().get(name)

    def _volume(self, volume: VolumeRecord) -> StoredVolume:
        found = self._look_for(volume.name)
        if found is None:
            raise NotFoundError(f"The store of pool {self.record.name!r} has no volume {volume.name!r}.")
        return found

    def identity(self) -> str | None:
        found = _uuid_at(self._path)
        return None if found is None else f"store {found}"

    def check(self) -> None:
        self._door()

    # space

    def space(self) -> Space:
        found = self._door().figures()
        most = int(found.capacity * self._options.overcommit)
        return Space(found.size, found.capacity, found.used, found.promised, most, found.reclaiming)

    def usage(self) -> Usage:
        space = self.space()
        return Usage(space.capacity, space.free)

    def default_size(self) -> int | None:
        return None

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        admit_to_capacity(self.record, extra, volumes)
        space = self.space()
        promised = sum(volume.size for volume in volumes)
        if promised + extra > space.promised_at_most:
            raise self._overcommitted(space, promised, extra)

    def _overcommitted(self, space: Space, promised: int, extra: int) -> NoSpaceError:
        name = self.record.name
        return NoSpaceError(
            f"The volumes of pool {name!r} may have {format_size(space.promised_at_most)} together "
            f"({self._options.overcommit:g} times the {format_size(space.capacity)} of its drive). They have "
            f"{format_size(promised)}, and {format_size(extra)} more were asked for. Choose a smaller size, delete a "
            f"volume, or give the drive more room and run `ringstone pool grow {name}`."
        )

    def grow(self, size: int | None) -> None:
        door = self._changing()
        if size is not None:
            self._lengthen(size)
        door.grow()

    def begin_scrub(self, rate: int) -> None:
        self._door().begin_scrub(rate)

    def cancel_scrub(self) -> None:
        self._door().cancel_scrub()

    def scrub(self) -> Scrub | None:
        return self._door().scrub()

    def _lengthen(self, size: int) -> None:
        try:
            if self._is_device():
                raise InvalidError(
                    f"{self._path} is a device, which has its own size: enlarge it, and leave the size out."
                )
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            try:
                before = os.fstat(fd).st_size
                if size <= before:
                    raise InvalidError(
                        f"{self._path} has {format_size(before)} already, and a store cannot shrink; name a larger "
                        "size."
                    )
                try:
                    os.posix_fallocate(fd, before, size - before)
                    os.fsync(fd)
                except OSError:
                    os.ftruncate(fd, before)
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise error_of_os(
                error, f"making {self._path} {size} bytes long", "Choose a smaller size."
            ) from error

    # volumes

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        if volume.name in self._volumes():
            raise ExistsError(
                f"The store of pool {self.record.name!r} has a volume {volume.name!r} that this gateway's state does "
                "not know; choose another name."
            )

    def create_backing(self, volume: VolumeRecord) -> None:
        self._changing().create(volume.name, volume.size)

    def create_sealed(self, volume: VolumeRecord, *, integrity: bool, encryption: bool) -> None:
        if not encryption:
            return self._changing().create(volume.name, volume.size, integrity=integrity)
        key = KEYS.read(self._key_source())
        self._changing().create_encrypted(volume.name, volume.size, integrity=integrity, key=key)

    def remove_backing(self, volume: VolumeRecord) -> None:
        with suppress(NotFoundError):
            self._changing(patient=True).delete(volume.name)

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        # What an undone growth added costs nothing, and the next one uses it.
        if size > self._volume(volume).size:
            self._changing().resize(volume.name, size)

    def check_backing(self, volume: VolumeRecord) -> None:
        try:
            have = self._volume(volume).size
        except (NotFoundError, NoDeviceError) as error:
            raise FailedError(f"Volume {volume.name!r} has no backing. {error}") from error
        if have < volume.size:
            raise FailedError(
                f"Volume {volume.name!r} has {have} bytes in the store at {self._path} instead of {volume.size}; "
                "restore it from a backup."
            )

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        # Opening it says whether it is there. A gateway that was just killed may have the store open still.
        return None

    def allocated(self, volume: VolumeRecord) -> int | None:
        try:
            return self._volume(volume).own
        except RingstoneError:
            return None

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        self._refuse_other_store()
        return {"type": "store", "path": self._path, "volume": volume.name}

    # snapshots

    def snapshots(self, volume: VolumeRecord) -> list[Snapshot]:
        return list(self._volume(volume).snapshots)

    def create_snapshot(self, volume: VolumeRecord, name: str) -> None:
        self.create_group_snapshot([volume], name)

    def create_group_snapshot(self, volumes: Sequence[VolumeRecord], name: str) -> None:
        self._changing().snapshot([volume.name for volume in volumes], name)

    def remove_snapshot(self, volume: VolumeRecord, name: str) -> None:
        self._changing().delete_snapshot(volume.name, name)

    def deletions(self, volume: VolumeRecord) -> list[Deletion]:
        return list(self._volume(volume).deleting)

    def keep_snapshot(self, volume: VolumeRecord, name: str) -> None:
        self._changing().keep_snapshot(volume.name, name)

    def reclaimable(self, volume: VolumeRecord) -> dict[str, int | None]:
        return self._door().reclaimable(volume.name)

    def revert(self, volume: VolumeRecord, name: str) -> None:
        self._changing(patient=True).revert(volume.name, name)

    def clone_backing(self, parent: VolumeRecord, snapshot: str, volume: VolumeRecord) -> None:
        self._changing().clone(parent.name, snapshot, volume.name)

    def clone_running(self, parent: VolumeRecord, volume: VolumeRecord) -> None:
        self._changing().clone(parent.name, None, volume.name)

    def flatten(self, volume: VolumeRecord) -> None:
        self._changing().flatten(volume.name)

    def parent(self, volume: VolumeRecord) -> str | None:
        origin = self._volume(volume).origin
        return None if origin is None else "@".join(origin)

    def diff(self, volume: VolumeRecord, since: str | None, until: str | None) -> list[tuple[int, int]]:
        return self._door().diff(volume.name, since, until)

    def sealed(self, volume: VolumeRecord) -> Sealed | None:
        try:
            found = self._volume(volume)
        except RingstoneError:
            return None
        return Sealed(found.integrity, found.encryption)

    # keys

    def key(self, volume: VolumeRecord) -> bytes | None:
        return KEYS.read(self._key_source()) if self._volume(volume).encryption else None

    def _key_source(self) -> KeySource:
        if self._options.key is None:
            name = self.record.name
            raise InvalidError(
                f"Pool {name!r} has no key, without which no volume of it can be encrypted. Give it one with "
                f"`ringstone pool rekey {name} --key-file /path/of/the/key`; {MAKE_ONE}."
            )
        return self._options.key

    def rekey(self, source: KeySource) -> PoolRecord:
        KEYS.forget()
        key, door = KEYS.read(source), self._changing()
        try:
            # The key so far may be gone, and is not needed where it has wrapped nothing.
            door.wrap_anew([], key)
        except DeniedError:
            if self._options.key is None:
                raise
            door.wrap_anew([KEYS.read(self._options.key)], key)
        rest = {name: value for name, value in self.record.options.items() if name not in KINDS}
        return replace(self.record, options={**rest, source.kind: source.place})

    def shared(self, volume: VolumeRecord) -> int | None:
        try:
            return self._volume(volume).inherited
        except RingstoneError:
            return None
