"""Whether the host has booted since the gateway was here last: then what was in memory is gone, and may be."""

import os
from pathlib import Path

from ringstone.errors import error_of_os

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Boots:
    """The kernel's id of the boot (random(4)) in which volumes were brought back last, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_new(self) -> bool:
        """Whether the file is of another boot. Where nothing is noted yet it is taken for new, as nobody was here."""
        try:
            return self._path.read_bytes() != _BOOT_ID.read_bytes()
        except FileNotFoundError:
            return True
        except OSError as error:
            raise error_of_os(error, f"reading {self._path}", "Check the state directory.") from error

    def note(self) -> None:
        """This boot's volumes are all there. A boot that is not noted only counts as new once more."""
        written = self._path.with_suffix(".new")
        try:
            written.write_bytes(_BOOT_ID.read_bytes())
            os.replace(written, self._path)
        except OSError as error:
            raise error_of_os(error, f"writing {self._path}", "Check the state directory.") from error
