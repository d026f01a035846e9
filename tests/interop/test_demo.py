"""`ringstone demo`, as a person starts and interrupts it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "ringstone", "demo"]


def _children(pid: int) -> set[int]:
    """All processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child} | _children(child)
    return found


@pytest.mark.parametrize("pool", ["file", "memory"])
def test_every_verification_passes_and_nothing_is_left(pool: str, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    folders = set(Path("/var/tmp").glob("ringstone-demo-*"))
    arguments = ["--json", "--pool", pool, "--size", "256M", "--seconds", "0.5", "--report", str(report)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] is True
    assert [check["passed"] for check in result["checks"]] == [True] * 6
    assert len(result["measurements"]) == 4
    for measurement in result["measurements"]:
        assert measurement["iops"] > 0
        assert measurement["gateway"]["operations"] >= measurement["guest"]["operations"]
    assert "verdict passed" in report.read_text()
    assert set(Path("/var/tmp").glob("ringstone-demo-*")) == folders


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_what_it_started(number: signal.Signals, tmp_path: Path) -> None:
    folders = set(Path("/var/tmp").glob("ringstone-demo-*"))
    demo = subprocess.Popen(
        [*COMMAND, "--report", str(tmp_path / "report.html")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with demo:
        assert demo.stderr is not None
        seen = ""
        for line in demo.stderr:
            seen += line
            if "Guest boots" in line:
                break
        processes = _children(demo.pid)
        demo.send_signal(number)
        seen += demo.stderr.read()
        status = demo.wait(60)
    assert len(processes) >= 2, seen  # the gateway and QEMU
    assert status != 0
    assert not [pid for pid in processes if os.path.exists(f"/proc/{pid}")]
    assert set(Path("/var/tmp").glob("ringstone-demo-*")) == folders
    assert not (tmp_path / "report.html").exists()
