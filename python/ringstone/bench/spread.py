"""The arithmetic of repeated and interleaved measurements."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """Least, middle and greatest of the rounds."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """ValueError when there are none."""
        if not values:
            raise ValueError("There is nothing to take a spread of.")
        return cls(min(values), median(values), max(values))


def paired_ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratio of each round to the reference's figure of the same round, so that what slows the whole machine
    for a while slows both. ValueError when the rounds do not match or a reference is not positive."""
    if any(figure <= 0 for figure in reference):
        raise ValueError("A reference measured nothing, so there is no ratio to it.")
    return [value / figure for value, figure in zip(values, reference, strict=True)]


def interleave(rounds: int, contenders: Sequence[Callable[[], T]]) -> Iterator[tuple[int, int, T]]:
    """Run the contenders in turn, A B A B, and yield (round, contender, result)."""
    for turn in range(rounds):
        for index, contender in enumerate(contenders):
            yield turn, index, contender()


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach. `text` says it for a person."""

    text: str
    at_most: float | None = None
    at_least: float | None = None

    def met(self, figure: float) -> bool:
        return (self.at_most is None or figure <= self.at_most) and (
            self.at_least is None or figure >= self.at_least
        )
