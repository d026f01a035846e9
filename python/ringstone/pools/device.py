"""The file pool over one block device: the device is its one volume. Its content stays when the volume is deleted, and
is erased when the next one is made."""

import fcntl
import os
import stat
import struct
from collections.abc import Sequence

from ringstone.errors import (
    BusyError,
    ExistsError,
    FailedError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    error_of_os,
)
from ringstone.pools import occupancy
from ringstone.pools.base import Usage, admit_to_capacity
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord
from ringstone.units import format_size

# linux/fs.h. BLKZEROOUT(start, length): the drive zeroes by itself where it can, else the kernel writes zeroes.
_BLKZEROOUT = 0x127F
_BLKSSZGET = 0x1268
# Bytes zeroed in one call: whoever is told to end does not wait for a whole drive.
_ZEROED_AT_ONCE = 256 << 20


class DevicePool:
    """Implements ringstone.pools.Pool. Option `direct` as for ringstone.pools.file.FilePool."""

    def __init__(self, record: PoolRecord) -> None:
        if record.path is None or not os.path.isabs(record.path):
            raise InvalidError(
                f"File pool {record.name!r} needs the absolute path of a directory or block device."
            )
        self.record = record
        self._path = record.path

    def prepare(self, *, erase: bool = False) -> None:
        self.check()
        with occupancy.claimed(self._path):
            occupancy.refuse_users(self._path)
            try:
                held = None if erase else occupancy.content(self._path)
            except OSError as error:
                raise error_of_os(error, f"reading {self._path}", "Check the device.") from error
            if held is not None:
                raise ExistsError(
                    f"{self._path} is not empty: it holds {held}. A volume on it would erase that. Name another "
                    "device, or say that its content may be lost (--yes, or `erase` in the API)."
                )

    def discard(self) -> None:
        return

    def identity(self) -> str | None:
        return occupancy.medium(self._path)

    def check(self) -> None:
        try:
            mode = os.stat(self._path).st_mode
        except OSError as error:
            raise NoDeviceError(
                f"The device {self._path} of pool {self.record.name!r} is not there: {error.strerror}. "
                "Check the path and the cabling, or `lsblk`."
            ) from error
        if not stat.S_ISBLK(mode):
            raise NoDeviceError(
                f"{self._path} of pool {self.record.name!r} is no block device; name a block device or a "
                "directory."
            )

    def usage(self) -> Usage:
        size = self._device_size()
        return Usage(size, size)

    def _device_size(self) -> int:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.lseek(fd, 0, os.SEEK_END)
            finally:
                os.close(fd)
        except OSError as error:
            raise error_of_os(
                error, f"asking the size of {self._path}", "Check the path and `lsblk`."
            ) from error

    def default_size(self) -> int | None:
        return min(self._device_size(), self.record.capacity or self._device_size())

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        if new and volumes:
            raise BusyError(
                f"Pool {self.record.name!r} is one block device and holds volume {volumes[0].name!r} "
                "already. "
                "Use another pool."
            )
        admit_to_capacity(self.record, extra, volumes)
        used = sum(volume.size for volume in volumes)
        if used + extra > self._device_size():
            raise NoSpaceError(self._too_small(extra, used))

    def _too_small(self, extra: int, used: int) -> str:
        return (
            f"The device {self._path} has {format_size(self._device_size())}, {format_size(used)} of it in "
            "use, and "
            f"{format_size(extra)} more were asked for. Choose a smaller size or another pool."
        )

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        return

    def create_backing(self, volume: VolumeRecord) -> None:
        """The device holds another volume's bytes, or whatever was on it before."""
        self.check()
        with occupancy.claimed(self._path) as fd:
            occupancy.refuse_users(self._path)
            self._zero(fd, 0, volume.size)

    def _zero(self, fd: int, start: int, end: int) -> None:
        """To the end of the last block of the device, and durable."""
        at = start
        try:
            block = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
            at, end = (-(-edge // block) * block for edge in (start, end))
            while at < end:
                length = min(_ZEROED_AT_ONCE, end - at)
                fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", at, length))
                at += length
            os.fsync(fd)
        except OSError as error:
            raise error_of_os(
                error, f"zeroing {self._path} from byte {at}", "Check the device (dmesg)."
            ) from error

    def remove_backing(self, volume: VolumeRecord) -> None:
        return

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        if size > self._device_size():
            raise NoSpaceError(self._too_small(size - volume.size, volume.size))
        if size <= volume.size:
            return
        try:
            # The volume's guest may be running, so the device is claimed already.
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise error_of_os(error, f"opening {self._path}", "Check the device.") from error
        try:
            self._zero(fd, volume.size, size)
        finally:
            os.close(fd)

    def check_backing(self, volume: VolumeRecord) -> None:
        try:
            self.check()
            length = self._device_size()
        except NoDeviceError as error:
            raise FailedError(f"Volume {volume.name!r} has no backing. {error}") from error
        if length < volume.size:
            raise FailedError(
                f"The device {self._path} of volume {volume.name!r} has {length} bytes instead of "
                f"{volume.size}. "
                "Check that it is the right device, and that it is whole."
            )

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        self.check_backing(volume)
        return None

    def allocated(self, volume: VolumeRecord) -> int | None:
        return volume.size

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        return {"type": "file", "path": self._path, "direct": self.record.options.get("direct", "auto")}
