"""Sizes, rates and times as people write and read them. Sizes are bytes; units are binary (1K = 1024)."""

import re
from datetime import UTC, datetime
from fractions import Fraction

_UNITS = ("", "K", "M", "G", "T", "P", "E")
_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[KMGTPE]?)(?:iB|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in `text`: "4096", "512M", "10G", "10GiB" or "1.5T". Units are binary; "GB" is refused as
    ambiguous.

    Raises ValueError with a sentence that shows the accepted forms.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or re.fullmatch(r".*[KMGTPE]B", text.strip(), re.IGNORECASE):
        raise ValueError(f"{text!r} is not a size; write bytes or a binary unit such as 512M, 10G or 1.5TiB.")
    factor = 1024 ** _UNITS.index(match["unit"].upper())
    size = Fraction(match["number"]) * factor
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes; use a smaller unit.")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes with the largest binary unit that leaves at least one: 10737418240 is "10 GiB"."""
    unit = 0
    while unit + 1 < len(_UNITS) and size >= 1024 ** (unit + 1):
        unit += 1
    if unit == 0:
        return f"{size} B"
    value = size / 1024**unit
    digits = f"{value:.2f}".rstrip("0").rstrip(".") if value < 1000 else f"{value:.0f}"
    return f"{digits} {_UNITS[unit]}iB"


def format_rate(per_second: float) -> str:
    """A count per second in three significant digits: 1234567 is "1.23M"."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= factor:
            return f"{per_second / factor:.3g}{unit}"
    return f"{per_second:.3g}" if per_second else "0"


def format_latency(nanoseconds: int | None) -> str:
    """`nanoseconds` as "850 ns", "12.3 us", "4.56 ms" or "1.2 s"; "-" when there was nothing to measure."""
    if nanoseconds is None:
        return "-"
    for factor, unit in ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us")):
        if nanoseconds >= factor:
            return f"{nanoseconds / factor:.3g} {unit}"
    return f"{nanoseconds} ns"


def utc(nanoseconds: int) -> datetime:
    """CLOCK_REALTIME nanoseconds as a time, to the microsecond."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
