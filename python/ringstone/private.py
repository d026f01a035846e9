"""Files with a secret in them: what every user may read is none."""

import os
import stat
from pathlib import Path

from ringstone.errors import InvalidError, error_of_os


def read_private(path: Path, setting: str) -> str:
    """A text file. InvalidError when other users than its owner and group may read or change it; `setting` is for the
    messages."""
    try:
        with path.open() as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IRWXO:
                raise InvalidError(
                    f"Every user may read or change {path}, which has a secret in it; run `chmod o= {path}`, and make "
                    "a new secret if the machine has other users."
                )
            return file.read()
    except UnicodeDecodeError as error:
        raise InvalidError(f"{path} is no text file; correct {setting}.") from error
    except OSError as error:
        raise error_of_os(
            error, f"reading {path}", f"Correct {setting}, or the file's permissions."
        ) from error
