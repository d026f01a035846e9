"""Writes a cpio archive in the "newc" format, which the Linux kernel unpacks as its initramfs.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux kernel. Owners are root, times
are zero and inode numbers are counted, so the same files always give the same bytes.
"""

import stat
from typing import BinaryIO


class CpioWriter:
    """Entries in the order they are added; a directory must come before what is in it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._directories: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory with all its parents; one that is already there is left alone."""
        path = path.strip("/")
        if not path or path in self._directories:
            return
        parent = path.rpartition("/")[0]
        self.directory(parent)
        self._directories.add(path)
        self._entry(path, stat.S_IFDIR | mode)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A regular file; its parents are made."""
        self.directory(path.strip("/").rpartition("/")[0])
        self._entry(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link; its parents are made."""
        self.directory(path.strip("/").rpartition("/")[0])
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node, for what init needs before devtmpfs is mounted."""
        self.directory(path.strip("/").rpartition("/")[0])
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def close(self) -> None:
        """Write the trailer; the stream stays open."""
        self._entry("TRAILER!!!", 0)

    def _entry(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = path.strip("/").encode() + b"\0"
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._out.write(header + name + _padding(len(header) + len(name)))
        self._out.write(content + _padding(len(content)))


def _padding(length: int) -> bytes:
    return b"\0" * (-length % 4)
