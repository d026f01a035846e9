"""Latency histograms as inline SVG: share of requests over latency on a logarithmic axis, no script
needed."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ringstone.demo.plan import Latency
from ringstone.units import format_latency

Axis = Callable[[float], float]

BINS_PER_DECADE = 10
_LEAST_SHARE = 0.0002  # bins that hold less, far out, would only stretch the axis
_WIDTH, _HEIGHT = 640, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 30


@dataclass(frozen=True)
class Series:
    """One distribution of a chart. `css` is the class that colours it."""

    label: str
    css: str
    latency: Latency


def log_bins(bins: Iterable[tuple[int, int, int]]) -> dict[int, float]:
    """Requests by logarithmic bin: bin k holds the latencies from 10 ** (k / BINS_PER_DECADE) ns on. A source
    bin that spans several is shared out by its width on the logarithmic axis."""
    counts: dict[int, float] = {}
    for lower, upper, requests in bins:
        start = math.log10(max(lower, 1)) * BINS_PER_DECADE
        end = max(math.log10(max(upper, 1)) * BINS_PER_DECADE, start + 1e-9)
        for index in range(math.floor(start), math.floor(end) + 1):
            part = min(end, index + 1) - max(start, index)
            if part > 0:
                counts[index] = counts.get(index, 0.0) + requests * part / (end - start)
    return counts


def latency_chart(series: Sequence[Series]) -> str:
    """An `<svg>` with one outline per series; an empty string when none holds a request."""
    shares: list[tuple[Series, dict[int, float]]] = []
    for one in series:
        counts = log_bins(one.latency.bins)
        total = sum(counts.values())
        if total:
            shares.append((one, {index: count / total for index, count in counts.items()}))
    if not shares:
        return ""
    shown = {index for _, bins in shares for index, share in bins.items() if share >= _LEAST_SHARE}
    shares = [
        (one, {index: bins[index] for index in bins if min(shown) <= index <= max(shown)})
        for one, bins in shares
    ]
    first = math.floor(min(shown) / BINS_PER_DECADE) * BINS_PER_DECADE
    last = math.ceil((max(shown) + 1) / BINS_PER_DECADE) * BINS_PER_DECADE
    peak = max(share for _, bins in shares for share in bins.values())
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if peak <= 5 * step or step == 0.5)
    top = math.ceil(peak / step - 1e-9) * step

    def x(index: float) -> float:
        return _LEFT + (index - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Latency histogram of {escape(" and ".join(one.label for one, _ in shares))}">'
    ]
    for tick in range(round(top / step) + 1):
        at = y(tick * step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick * step:.0%}</text>'
        )
    for index in range(first, last + 1, BINS_PER_DECADE):
        at = x(index)
        anchor = "end" if index == last else "middle"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        label = format_latency(10 ** (index // BINS_PER_DECADE))
        below = _HEIGHT - _BOTTOM + 16
        parts.append(f'<text class="tick" x="{at:.1f}" y="{below}" text-anchor="{anchor}">{label}</text>')
    for one, bins in shares:
        parts.append(f'<g class="{one.css}">{_outline(bins, x, y)}')
        parts.extend(_hover(one.label, bins, x, y))
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def _outline(bins: dict[int, float], x: Axis, y: Axis) -> str:
    """The distribution as one stepped area."""
    low, high = min(bins), max(bins) + 1
    points = [f"M{x(low):.1f},{y(0):.1f}"]
    for index in range(low, high):
        points.append(f"V{y(bins.get(index, 0.0)):.1f}H{x(index + 1):.1f}")
    points.append(f"V{y(0):.1f}Z")
    return f'<path d="{"".join(points)}"/>'


def _hover(label: str, bins: dict[int, float], x: Axis, y: Axis) -> Iterable[str]:
    """Invisible columns that tell their numbers when pointed at."""
    for index, share in bins.items():
        edges = (round(10 ** (at / BINS_PER_DECADE)) for at in (index, index + 1))
        span = " to ".join(format_latency(edge) for edge in edges)
        at, above = x(index), y(share)
        yield (
            f'<rect class="hover" x="{at:.1f}" y="{above:.1f}" width="{x(index + 1) - at:.1f}" '
            f'height="{y(0) - above:.1f}"><title>{escape(label)}: {share:.1%} took {span}</title></rect>'
        )
