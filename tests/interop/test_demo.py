"""`ringstone demo`, as a person starts and interrupts it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "ringstone", "demo"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo makes its folder. Short, as the path of a Unix socket may have 107 bytes only."""
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/var/tmp") as folder:
        yield Path(folder)


def _children(pid: int) -> set[int]:
    """All processes below `pid`. Threads and processes may end while they are looked at."""
    found: set[int] = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                for child in map(int, (task / "children").read_text().split()):
                    found |= {child} | _children(child)
    return found


@pytest.mark.parametrize(
    "pool", ["store", *(pytest.param(one, marks=pytest.mark.soak) for one in ("file", "memory"))]
)
def test_every_verification_passes_and_nothing_is_left(pool: str, tmp_path: Path, temporary: Path) -> None:
    report = tmp_path / "report.html"
    arguments = ["--json", "--pool", pool, "--size", "256M", "--seconds", "0.5", "--report", str(report)]
    environment = os.environ | {"TMPDIR": str(temporary)}
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] is True
    assert [check["passed"] for check in result["checks"]] == [True] * (9 if pool == "store" else 6)
    assert len(result["measurements"]) == 4
    for measurement in result["measurements"]:
        assert measurement["iops"] > 0
        assert measurement["gateway"]["operations"] >= measurement["guest"]["operations"]
    assert "verdict passed" in report.read_text()
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_what_it_started(
    number: signal.Signals, tmp_path: Path, temporary: Path
) -> None:
    demo = subprocess.Popen(
        [*COMMAND, "--report", str(tmp_path / "report.html")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
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
    assert not list(temporary.iterdir())
    assert not (tmp_path / "report.html").exists()
