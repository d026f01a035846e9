"""What is being made or deleted, noted in files: a gateway that dies in between finds there what to undo or to finish.

Of volumes on the host's own drives their rows in the store tell as much. Of those in a cluster they do not: another
host may be making or deleting one just now.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Generic

from ringstone.errors import StateError, error_of_os
from ringstone.state.codec import from_json, to_json
from ringstone.state.records import Kind, R


class Unfinished(Generic[R]):
    """A file for each record of `kind`, in `directory`."""

    def __init__(self, directory: Path, kind: Kind[R]) -> None:
        self._directory: Path = directory / kind.name
        self._kind: Kind[R] = kind

    @contextmanager
    def noted(self, record: R) -> Iterator[None]:
        """While the block runs; whoever fails in it undoes what it has done."""
        path = self._directory / f"{self._kind.key_of(record)}.json"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(to_json(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise error_of_os(error, f"writing {path}", "Check the state directory.") from error
        try:
            yield
        except Exception:
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)

    def left(self) -> Iterator[tuple[R, Callable[[], None]]]:
        """Those of a gateway before this one, and what forgets each."""
        for path in sorted(self._directory.glob("*.json")):
            text = path.read_text()
            forget = partial(path.unlink, missing_ok=True)
            if not text.endswith("}"):
                # Nothing was begun before the note was whole.
                forget()
                continue
            try:
                record = from_json(self._kind, text)
            except ValueError as error:
                raise StateError(f"{path} cannot be used ({error}); remove it.") from error
            yield record, forget
