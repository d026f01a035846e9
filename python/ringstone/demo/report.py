"""The demo's HTML report: one file with its styles and charts inside, readable without scripts or network."""

from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from ringstone.demo.chart import Series, latency_chart
from ringstone.demo.plan import Check, DemoResult, Latency, Measurement
from ringstone.units import format_latency, format_rate, format_size
from ringstone.version import version

_SPEED_HEAD = """<tr><th rowspan="2">Shape</th><th rowspan="2">IOPS</th><th rowspan="2">Bandwidth</th>
<th class="group" colspan="4">Latency in the guest</th><th class="group" colspan="2">In the gateway</th>
<th rowspan="2">Reactor<br>busy</th></tr>
<tr><th>mean</th><th>p50</th><th>p99</th><th>p99.9</th><th>p50</th><th>p99</th></tr>"""
_STYLE = Path(__file__).with_name("report.css")


def write_report(path: Path, result: DemoResult) -> None:
    """Write the report of `result` to `path`. OSError when that cannot be."""
    path.write_text(render_report(result), encoding="utf-8")


def render_report(result: DemoResult) -> str:
    """The whole HTML document."""
    verdict = "passed" if result.passed else "failed"
    held = sum(check.passed for check in result.checks)
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ringstone demo: {verdict}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>Ringstone demo</h1>
<p class="lead">A Linux guest whose disk is a Ringstone volume, served over vhost-user-blk. {at},
{result.seconds:.0f} s.</p>
<p class="verdict {verdict}">{held} of {len(result.checks)} checks passed</p>
<h2>Verification</h2>
<div class="card scroll">{_checks(result.checks)}</div>
<h2>Speed</h2>
<div class="card scroll">{_speed(result.measurements)}</div>
<h2>Latency</h2>
<p class="lead">Share of requests by latency, on a logarithmic axis. The guest's view is fio's, with the
guest's kernel and the hypervisor in it; the gateway's runs from the poll that found a request to its
completion in the ring.</p>
<div class="charts">{"".join(_chart(measurement) for measurement in result.measurements)}</div>
<h2>Setting</h2>
<div class="card">{_setting(result.setting)}</div>
<footer>Ringstone {escape(version())}</footer>
</main>
</body>
</html>
"""


def _table(head: str, rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _setting(lines: Iterable[tuple[str, str]]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines)
        + "</dl>"
    )


def _checks(checks: Iterable[Check]) -> str:
    def row(check: Check) -> Iterable[str]:
        kind = "passed" if check.passed else "failed"
        yield f'<td class="text">{escape(check.title)}</td>'
        yield f'<td class="text"><span class="mark {kind}">{kind}</span></td>'
        yield f'<td class="text">{escape(check.detail)}</td>'

    head = "<tr>" + "".join(f'<th class="text">{name}</th>' for name in ("Check", "Result", "Seen")) + "</tr>"
    return _table(head, (row(check) for check in checks))


def _speed(measurements: Iterable[Measurement]) -> str:
    def row(measurement: Measurement) -> Iterable[str]:
        guest, gateway = measurement.guest, measurement.gateway
        yield _cell(measurement.title)
        yield _cell(format_rate(measurement.iops))
        yield _cell(f"{format_size(round(measurement.bytes_per_second))}/s")
        for latency in (guest.mean_ns, guest.p50_ns, guest.p99_ns, guest.p999_ns):
            yield _cell(format_latency(round(latency)))
        yield _cell(format_latency(gateway.p50_ns if gateway else None))
        yield _cell(format_latency(gateway.p99_ns if gateway else None))
        yield _cell(f"{measurement.busy:.0%}")

    return _table(_SPEED_HEAD, (row(measurement) for measurement in measurements))


def _chart(measurement: Measurement) -> str:
    series = [Series("Guest", "guest", measurement.guest)]
    if measurement.gateway:
        series.insert(0, Series("Gateway", "gateway", measurement.gateway))
    keys = "".join(
        f'<span class="entry"><span class="key {one.css}"></span>{one.label} {_summary(one.latency)}</span> '
        for one in series
    )
    return (
        f'<section class="card"><h3>{escape(measurement.title)}</h3>'
        f'<p class="legend">{keys}</p>{latency_chart(series)}</section>'
    )


def _summary(latency: Latency) -> str:
    return f"p50 {format_latency(latency.p50_ns)}, p99 {format_latency(latency.p99_ns)}"
