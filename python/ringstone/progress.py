"""How what takes long tells a person where it stands."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """A running step; `detail` is shown beside it once it is done."""

    detail: str


class Progress(Protocol):
    """Shows a person what is being done."""

    def step(self, title: str) -> AbstractContextManager[Step]:
        """A step that lasts as long as the context."""


class _Untold:
    detail = ""


class NoProgress:
    """For when nobody looks."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        yield _Untold()
