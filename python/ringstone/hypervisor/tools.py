"""What the makers of guests' images share: their error, their lock, and running a tool."""

import fcntl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ringstone.errors import RingstoneError


class GuestImageError(RingstoneError):
    """The image cannot be built; the message says what to do."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`: two builds into one cache take turns."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_tool(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """Standard output of `command`; its last words as the error when it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise GuestImageError(f"The program {command[0]} is missing; install it and try again.") from error
    if done.returncode:
        last_words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise GuestImageError(f"`{' '.join(command)}` failed: {last_words}")
    return done.stdout
