"""Rows that are judged, raw figures beside them, and the files they are kept in."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ringstone.bench.compare import Rounds
from ringstone.bench.machine import Machine
from ringstone.bench.spread import Bar, Spread, paired_ratios

NO_BAR = "-"
# Before the names of other suites.
_FIRST = "gateway"


class Row(BaseModel):
    """One line of the table: a figure, the reference it is judged by, and the verdict. `judged` is what the
    bar was applied to: the median ratio, or the median figure. Without a bar the figure is told and not judged, and
    `passed` is None."""

    section: str
    what: str
    unit: str
    value: Spread
    reference: str | None = None
    reference_value: Spread | None = None
    ratio: Spread | None = None
    bar: str
    judged: float
    passed: bool | None
    limited_by: str

    @classmethod
    def absolute(cls, section: str, what: str, unit: str, value: Spread, bar: Bar, limited_by: str) -> "Row":
        """Judged by its own median."""
        return cls(
            section=section,
            what=what,
            unit=unit,
            value=value,
            bar=bar.text,
            judged=value.median,
            passed=bar.met(value.median),
            limited_by=limited_by,
        )

    @classmethod
    def relative(
        cls,
        section: str,
        what: str,
        unit: str,
        value: Spread,
        reference: tuple[str, Spread],
        ratio: Spread,
        bar: Bar,
        limited_by: str,
    ) -> "Row":
        """Judged by the median of the ratios."""
        return cls(
            section=section,
            what=what,
            unit=unit,
            value=value,
            reference=reference[0],
            reference_value=reference[1],
            ratio=ratio,
            bar=bar.text,
            judged=ratio.median,
            passed=bar.met(ratio.median),
            limited_by=limited_by,
        )

    @classmethod
    def beside(
        cls,
        section: str,
        what: str,
        unit: str,
        values: Sequence[float],
        reference: tuple[str, Sequence[float]],
        limited_by: str,
        bar: Bar | None = None,
        *,
        judge: Literal["ratio", "figure"] = "ratio",
    ) -> "Row":
        """Rounds beside the reference's rounds, judged by the median of the ratios or of the figure itself. Where the
        figure is judged the reference may be 0, as of a process that used no CPU; there is no ratio then."""
        value = Spread.of(values)
        no_ratio = judge == "figure" and not all(figure > 0 for figure in reference[1])
        ratio = None if no_ratio else Spread.of(paired_ratios(values, reference[1]))
        judged = ratio.median if ratio is not None and judge == "ratio" else value.median
        return cls(
            section=section,
            what=what,
            unit=unit,
            value=value,
            reference=reference[0],
            reference_value=Spread.of(reference[1]),
            ratio=ratio,
            bar=bar.text if bar is not None else NO_BAR,
            judged=judged,
            passed=bar.met(judged) if bar is not None else None,
            limited_by=limited_by,
        )

    @classmethod
    def told(cls, section: str, what: str, unit: str, values: Sequence[float], limited_by: str) -> "Row":
        """A figure without a bar."""
        value = Spread.of(values)
        return cls(
            section=section,
            what=what,
            unit=unit,
            value=value,
            bar=NO_BAR,
            judged=value.median,
            passed=None,
            limited_by=limited_by,
        )


class Raw(BaseModel):
    """All rounds of one contender, as measured."""

    section: str
    contender: str
    shape: dict[str, Any]
    rounds: list[dict[str, Any]]

    @classmethod
    def of(cls, section: str, rounds: Rounds) -> "Raw":
        figures = [
            {
                "iops": one.iops,
                "mean_ns": one.mean_ns,
                "p99_ns": one.p99_ns,
                "reactor_busy_ns": one.reactor.busy_ns if one.reactor else None,
                "reactor_busy_share": one.reactor.busy_share if one.reactor else None,
                "cpu": asdict(one.cpu) if one.cpu else None,
                "report": one.raw,
            }
            for one in rounds.measurements
        ]
        return cls(section=section, contender=rounds.name, shape=rounds.shape.as_dict(), rounds=figures)


class Results(BaseModel):
    """A whole run."""

    name: str
    command: str = "ringstone bench suite"
    plan: str
    machine: Machine
    notes: list[str] = []
    rows: list[Row] = []
    raw: list[Raw] = []

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed is not False for row in self.rows)

    @property
    def verdict(self) -> str:
        judged = [row.passed for row in self.rows if row.passed is not None]
        return f"{sum(judged)} of {len(judged)} bars met"

    def keep(self, section: str, *rounds: Rounds) -> None:
        self.raw.extend(Raw.of(section, one) for one in rounds)

    def keep_raw(
        self, section: str, contender: str, shape: dict[str, Any], rounds: Sequence[dict[str, Any]]
    ) -> None:
        """Of what is not a load of one shape."""
        self.raw.append(Raw(section=section, contender=contender, shape=shape, rounds=list(rounds)))

    def write(self, directory: Path) -> Path:
        """Write <day>-<name>.json and make README.md anew from it and the latest of each other suite; the path of the
        former."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.machine.at[:10]}-{self.name}.json"
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")
        runs = [(self, path.name), *_latest_others(directory, self.name)]
        runs.sort(key=lambda run: (run[0].name != _FIRST, run[0].name))
        shown = {name for _, name in runs}
        others = sorted(other.name for other in directory.glob("*.json") if other.name not in shown)
        (directory / "README.md").write_text(markdown(runs, others))
        return path


def _latest_others(directory: Path, name: str) -> list[tuple[Results, str]]:
    """The newest run of each suite but `name`, with its file. One that this version cannot read is left out."""
    latest: dict[str, tuple[Results, str]] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            results = Results.model_validate_json(path.read_text())
        except ValidationError:
            continue
        if results.name != name:
            latest[results.name] = (results, path.name)
    return list(latest.values())


def markdown(runs: Sequence[tuple[Results, str]], others: list[str]) -> str:
    """The tables with what they were measured on, for people. `runs`: results with the file that holds them."""
    lines = [
        "# Results",
        "",
        "The method: [docs/benchmarks.md](../../docs/benchmarks.md). A figure is its median with least and greatest",
        "of the rounds in brackets; a ratio is taken round by round.",
        "",
    ]
    for results, raw in runs:
        lines += _tables(results, raw)
    if others:
        lines += ["## Earlier runs", "", *(f"- [{other}]({other})" for other in others), ""]
    return "\n".join(lines)


def _tables(results: Results, raw: str) -> list[str]:
    machine = results.machine
    lines = [
        f"## `{results.command}`",
        "",
        f"Measured {machine.at}: {results.plan}. Raw figures: [{raw}]({raw}).",
        "",
        f"- CPU: {machine.cpu}, {machine.cores} cores{', virtualised' if machine.virtualised else ''}; "
        f"{machine.memory_bytes / (1 << 30):.0f} GiB of memory; "
        f"load average {machine.load_average:.2f} at the start",
        f"- Software: {machine.distribution}, Linux {machine.kernel}; "
        + ", ".join(f"{tool} {_version(tool, version)}" for tool, version in machine.versions.items()),
        f"- Revision: {machine.revision or 'unknown'}",
        *(f"- {note}" for note in results.notes),
        "",
    ]
    for section in dict.fromkeys(row.section for row in results.rows):
        lines += [
            f"### {section[:1].upper()}{section[1:]}",
            "",
            "| what | Ringstone | beside | ratio | bar | met | what the limit was |",
            "|---|---|---|---|---|---|---|",
            *(_line(row) for row in results.rows if row.section == section),
            "",
        ]
    return lines


def _met(row: Row, missed: str) -> str:
    return {True: "yes", False: missed, None: "-"}[row.passed]


def _line(row: Row) -> str:
    beside = "-"
    if row.reference is not None and row.reference_value is not None:
        beside = f"{row.reference}: {figure(row.reference_value, row.unit)}"
    ratio = "-" if row.ratio is None else ratio_text(row.ratio)
    cells = (
        row.what,
        figure(row.value, row.unit),
        beside,
        ratio,
        row.bar,
        _met(row, "**no**"),
        row.limited_by,
    )
    return "| " + " | ".join(cells) + " |"


def figure(spread: Spread, unit: str) -> str:
    """Median with least and greatest, such as "1,234 (1,200..1,300) IOPS"."""
    digits = ",.0f" if spread.median >= 100 else ".3g"
    middle, low, high = (format(value, digits) for value in (spread.median, spread.minimum, spread.maximum))
    return f"{middle} ({low}..{high}) {unit}".rstrip()


def ratio_text(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.minimum:.2f}..{spread.maximum:.2f})"


def _version(tool: str, version: str) -> str:
    return version.removeprefix(f"{tool} version ").removeprefix(f"{tool}-")
