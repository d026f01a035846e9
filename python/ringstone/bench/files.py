"""Files and volumes that hold data before they are measured: holes and unwritten extents would flatter
everybody."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringstone.bench.load import drive
from ringstone.bench.shape import Cores, Shape, Window
from ringstone.errors import ExistsError, StorageError, error_of_os

_CHUNK = 4 << 20
_LONGEST_FILL = 64.0


@contextmanager
def filled(path: Path, size: int) -> Iterator[Path]:
    """A new file of `size` bytes of noise on stable storage, removed at the end."""
    try:
        with path.open("xb") as file:
            try:
                _fill(file.fileno(), size)
                yield path
            finally:
                path.unlink()
    except FileExistsError as error:
        raise ExistsError(f"{path} exists. Remove it, or choose another directory.") from error
    except OSError as error:
        raise error_of_os(
            error, f"writing {path}", "Choose a directory with room on a writable drive."
        ) from error


def _fill(descriptor: int, size: int) -> None:
    chunk = random.Random(size).randbytes(_CHUNK)
    for offset in range(0, size, _CHUNK):
        piece = memoryview(chunk)[: size - offset]
        while piece:
            piece = piece[os.write(descriptor, piece) :]
    os.fsync(descriptor)


def fill_volume(socket: Path, size: int, cores: Cores) -> None:
    """Write every block of a volume at least once, over its socket. StorageError when that takes too long."""
    shape = Shape(depth=8, block_size=128 << 10, read_share=0, pattern="sequential")
    window = Window(seconds=1.0, warmup=0.0)
    while (written := drive(socket, shape, window, cores).bytes) < size:
        # Each begins anew.
        window = Window(seconds=window.seconds * max(2.0, 1.3 * size / written), warmup=0.0)
        if window.seconds > _LONGEST_FILL:
            raise StorageError(
                f"Filling the {size} bytes of {socket} takes over {_LONGEST_FILL:g} s. "
                "Choose a smaller volume."
            )
