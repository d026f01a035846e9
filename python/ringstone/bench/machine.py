"""The machine a figure was measured on."""

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from pydantic import BaseModel

from ringstone.bench.hugepages import PAGE_BYTES, POOL
from ringstone.version import version


class Machine(BaseModel):
    """Kept beside every result. Tools that are not installed are left out of `versions`."""

    cpu: str
    cores: int
    virtualised: bool
    memory_bytes: int
    kernel: str
    distribution: str
    hugepages: int
    hugepage_bytes: int
    revision: str | None
    versions: dict[str, str]
    load_average: float
    at: str


def describe() -> Machine:
    """This machine, now."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return Machine(
        cpu=_first(r"^model name\s*:\s*(.+)$", cpuinfo) or platform.machine(),
        cores=os.cpu_count() or 1,
        virtualised=bool(re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)),
        memory_bytes=int(memory[1]) * 1024 if memory else 0,
        kernel=platform.release(),
        distribution=platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        hugepages=int(POOL.read_text()) if POOL.exists() else 0,
        hugepage_bytes=PAGE_BYTES,
        revision=revision_of(Path(__file__).resolve().parent),
        versions={"ringstone": version(), "python": platform.python_version()} | _tools(),
        load_average=os.getloadavg()[0],
        at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def filesystem_of(path: Path) -> str:
    """Type of the filesystem `path` is on, such as "ext4" or "tmpfs"."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def revision_of(directory: Path) -> str | None:
    """Of the checkout that `directory` is in; None where it is in none."""
    here = str(directory)
    revision = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changes = _output(
        "git", "-C", here, "status", "--porcelain", "--untracked-files=no", ":/crates", ":/python"
    )
    return f"{revision} with changes" if revision and changes else revision


def _tools() -> dict[str, str]:
    found = {
        "qemu-storage-daemon": _output("qemu-storage-daemon", "--version"),
        "fio": _output("fio", "--version"),
        "ceph": _output("rbd", "--version"),
    }
    return {tool: version.splitlines()[0] for tool, version in found.items() if version}
