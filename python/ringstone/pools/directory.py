"""Backings that are files in one directory: what file and memory pools have in common."""

import errno
import os
from pathlib import Path

from ringstone.errors import ExistsError, FailedError, NoDeviceError, error_of_os, unit_remedy
from ringstone.state.records import PoolRecord, VolumeRecord

_CHECK_PATH = "Check the path, its permissions and its filesystem."


class Directory:
    """Files `<volume>.raw` in `path`. `reserve`: take the blocks when the file is made instead of when
    written."""

    def __init__(self, path: Path, *, reserve: bool) -> None:
        self.path = path
        self._reserve = reserve

    def file(self, volume: VolumeRecord) -> Path:
        return self.path / f"{volume.name}.raw"

    def make(self) -> None:
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in reversed(missing):
                sync(path.parent)
        except OSError as error:
            raise error_of_os(error, f"making the directory {self.path}", _CHECK_PATH) from error

    def remove_if_empty(self) -> bool:
        """Whether the directory is gone; one that holds something stays."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def check(self, record: PoolRecord) -> None:
        if not self.path.is_dir():
            raise NoDeviceError(
                f"The directory {self.path} of pool {record.name!r} is not there. "
                "Create it, mount its filesystem, or check the path."
            )
        if not os.access(self.path, os.W_OK | os.X_OK):
            remedy = unit_remedy(errno.EROFS) or "Check its permissions and mount."
            raise NoDeviceError(
                f"The directory {self.path} of pool {record.name!r} is not writable. {remedy}"
            )

    def identity(self) -> str | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return f"directory {found.st_dev}:{found.st_ino}"

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        if os.path.lexists(self.file(volume)):
            raise self._foreign(volume)

    def _foreign(self, volume: VolumeRecord) -> ExistsError:
        return ExistsError(
            f"{self.file(volume)} exists already and belongs to no volume; move it away or choose another "
            "name."
        )

    def create(self, volume: VolumeRecord, length: int) -> None:
        path = self.file(volume)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise self._foreign(volume) from error
        except OSError as error:
            raise error_of_os(error, f"creating {path}", _CHECK_PATH) from error
        try:
            self._extend(fd, 0, length)
            os.fsync(fd)
            sync(self.path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise error_of_os(
                error, f"making {path} {length} bytes long", "Choose a smaller size or another pool."
            ) from error
        finally:
            os.close(fd)

    def resize(self, volume: VolumeRecord, length: int) -> None:
        path = self.file(volume)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise error_of_os(error, f"opening {path}", _CHECK_PATH) from error
        try:
            before = os.fstat(fd).st_size
            try:
                self._extend(fd, before, length)
                os.fsync(fd)
            except OSError as error:
                os.ftruncate(fd, before)
                raise error_of_os(
                    error, f"making {path} {length} bytes long", "Choose a smaller size or another pool."
                ) from error
        finally:
            os.close(fd)

    def _extend(self, fd: int, before: int, length: int) -> None:
        if self._reserve and length > before:
            # A mapped file whose blocks are not there would end the whole gateway with SIGBUS at the first
            # write.
            os.posix_fallocate(fd, before, length - before)
        else:
            os.ftruncate(fd, length)

    def remove(self, volume: VolumeRecord) -> None:
        path = self.file(volume)
        try:
            path.unlink(missing_ok=True)
            if self.path.is_dir():
                sync(self.path)
        except OSError as error:
            raise error_of_os(error, f"removing {path}", _CHECK_PATH) from error

    def check_file(self, volume: VolumeRecord) -> None:
        path = self.file(volume)
        try:
            length = path.stat().st_size
        except OSError as error:
            raise FailedError(
                f"The backing {path} of volume {volume.name!r} cannot be read: {error.strerror}. "
                "Bring it back: mount its filesystem, or restore it from a backup."
            ) from error
        if length < volume.size:
            raise FailedError(
                f"The backing {path} of volume {volume.name!r} has {length} bytes instead of {volume.size}. "
                f"If a growth was cut short, `truncate -s {volume.size} {path}` ends it; else restore it from a backup."
            )

    def allocated(self, volume: VolumeRecord) -> int | None:
        try:
            # st_blocks counts 512-byte units whatever the filesystem's block size: stat(2).
            return self.file(volume).stat().st_blocks * 512
        except OSError:
            return None


def sync(directory: Path) -> None:
    """Make created and removed names in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
