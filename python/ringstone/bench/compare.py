"""Contenders side by side: interleaved rounds, ratios round by round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from ringstone.bench.shape import Contender, Measurement, Shape, Window
from ringstone.bench.spread import Spread, interleave, paired_ratios

Progress = Callable[[str], None]
Figure = Callable[[Measurement], float]


@dataclass(frozen=True, slots=True)
class Plan:
    """How often and how long. `settle` is the window in which the best of several modes is chosen."""

    rounds: int = 5
    window: Window = field(default_factory=Window)
    settle: Window = field(default_factory=lambda: Window(seconds=0.5, warmup=0.1))

    @property
    def text(self) -> str:
        return f"{self.rounds} rounds of {self.window.seconds:g} s after {self.window.warmup:g} s of warm-up"


@dataclass(frozen=True, slots=True)
class Rounds:
    """All rounds of one contender with one shape."""

    name: str
    shape: Shape
    measurements: tuple[Measurement, ...]

    def spread(self, figure: Figure) -> Spread:
        return Spread.of([figure(one) for one in self.measurements])

    def ratio(self, reference: "Rounds", figure: Figure) -> Spread:
        """This contender's figure over the reference's, of the same rounds."""
        return Spread.of(
            paired_ratios(
                [figure(one) for one in self.measurements], [figure(one) for one in reference.measurements]
            )
        )

    def middle(self, figure: Callable[[Measurement], float | None]) -> float | None:
        """Median of a figure that not every contender has."""
        known = [value for one in self.measurements if (value := figure(one)) is not None]
        return median(known) if known else None


def compare(
    contenders: Sequence[tuple[Contender, Shape]], plan: Plan, progress: Progress
) -> tuple[Rounds, ...]:
    """Run every contender with its shape, A B A B."""
    taken: list[list[Measurement]] = [[] for _ in contenders]
    runs = [partial(contender.measure, shape, plan.window) for contender, shape in contenders]
    for turn, index, measurement in interleave(plan.rounds, runs):
        contender, shape = contenders[index]
        taken[index].append(measurement)
        progress(f"{shape}: round {turn + 1}/{plan.rounds}, {contender.name}: {measurement.iops:,.0f} IOPS")
    return tuple(
        Rounds(contender.name, shape, tuple(measurements))
        for (contender, shape), measurements in zip(contenders, taken, strict=True)
    )


def iops(measurement: Measurement) -> float:
    return measurement.iops


def mean_ns(measurement: Measurement) -> float:
    return measurement.mean_ns


def p99_ns(measurement: Measurement) -> float:
    return measurement.p99_ns


def worst_queue_p99_ns(measurement: Measurement) -> float:
    return max(measurement.queue_p99_ns)


def cpu_ns(measurement: Measurement) -> float:
    return measurement.cpu.ns if measurement.cpu else 0.0


def client_busy(measurement: Measurement) -> float | None:
    return measurement.client_busy


def reactor_busy_ns(measurement: Measurement) -> float | None:
    return measurement.reactor.busy_ns if measurement.reactor else None


def reactor_busy_share(measurement: Measurement) -> float | None:
    return measurement.reactor.busy_share if measurement.reactor else None


SATURATED = 0.85


def limited_by(rounds: Rounds, *, device: bool = False) -> str:
    """What kept the gateway from more, from what it and the client measured. `device`: a drive is behind
    it."""
    client, reactor = rounds.middle(client_busy), rounds.middle(reactor_busy_share)
    cost = rounds.middle(reactor_busy_ns)
    busy = f"reactor {_percent(reactor)} busy, client {_percent(client)} busy"
    if client is not None and client >= SATURATED:
        return f"the client is saturated ({busy})"
    if reactor is not None and cost is not None and reactor >= SATURATED:
        return f"the reactor is saturated at {cost:.0f} ns per request ({busy})"
    if device:
        return f"the drive and the kernel below it ({busy})"
    if rounds.shape.depth * rounds.shape.queues == 1 and cost is not None:
        return (
            f"one request at a time: {cost:.0f} ns of a round are the reactor's, the rest is the way between "
            "the cores and the client"
        )
    return f"neither side alone; memory and the way between the cores ({busy})"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"
