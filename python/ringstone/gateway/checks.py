"""Checks of what a person typed, each with the error that tells the next step."""

import re
from pathlib import Path

from ringstone.errors import InvalidError
from ringstone.units import format_size

NAME_PATTERN = r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$"
BLOCK_SIZES = (512, 4096)
# sockaddr_un holds 108 bytes with the closing NUL: unix(7).
_SOCKET_PATH_BYTES = 107


def check_name(noun: str, name: str) -> None:
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise InvalidError(
            f"{name!r} is not a {noun} name; use up to 63 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit."
        )


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise InvalidError(f"{block_size} is not a block size; use {' or '.join(map(str, BLOCK_SIZES))}.")


def check_size(size: int, block_size: int) -> None:
    if size % block_size:
        below = size // block_size * block_size
        nearest = f"{below} or {below + block_size}" if below else f"{block_size}"
        raise InvalidError(
            f"The size {size} is not a multiple of the block size {block_size}; use {nearest} bytes, for "
            "example."
        )


def check_growth(volume: str, size: int, new_size: int) -> None:
    if new_size < size:
        raise InvalidError(
            f"Volume {volume!r} has {format_size(size)} and cannot shrink to {format_size(new_size)}, "
            "as that would cut off data. Make a smaller volume and copy what is needed."
        )
    if new_size == size:
        raise InvalidError(f"Volume {volume!r} already has {format_size(size)}; give a larger size.")


def check_absolute(what: str, path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise InvalidError(f"The {what} {path!r} is not an absolute path; begin it with /.")


def check_socket(path: Path) -> None:
    check_absolute("socket", str(path))
    if len(bytes(path)) > _SOCKET_PATH_BYTES:
        raise InvalidError(
            f"The socket path {path} is longer than the {_SOCKET_PATH_BYTES} bytes that the kernel takes; "
            "choose a shorter one with --at or a shorter run directory."
        )
