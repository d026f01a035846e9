"""fio's own engines: what a file, the kernel and the drive, or a Ceph image give without any virtual disk."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringstone.bench.process import last_line, pinned
from ringstone.bench.shape import Cores, Measurement, Shape, Window
from ringstone.errors import StorageError


def command(file: Path, shape: Shape, window: Window) -> list[str]:
    """As the gateway does it: O_DIRECT, registered buffers and files, one process."""
    engine = [f"--filename={file}", "--ioengine=io_uring", "--fixedbufs=1", "--registerfiles=1"]
    return job(engine, shape.span_bytes or file.stat().st_size, shape, window)


def job(engine: Sequence[str], size: int, shape: Shape, window: Window) -> list[str]:
    """fio's command line for a shape, with the options that choose engine and target."""
    direction = {100: "read", 0: "write"}.get(shape.read_share, "rw")
    kind = direction if shape.pattern == "sequential" else f"rand{direction}"
    return [
        "fio",
        "--name=bench",
        *engine,
        "--direct=1",
        f"--rw={kind}",
        f"--rwmixread={shape.read_share}",
        f"--bs={shape.block_size}",
        f"--iodepth={shape.depth * shape.queues}",
        f"--size={size}",
        "--norandommap=1",
        "--randrepeat=0",
        "--time_based=1",
        f"--runtime={round(window.seconds * 1000)}ms",
        f"--ramp_time={round(window.warmup * 1000)}ms",
        "--output-format=json",
    ]


def parse(output: str) -> Measurement:
    """From fio's JSON, reads and writes together."""
    text = output[output.index("{") :]
    job: dict[str, Any] = json.loads(text)["jobs"][0]
    directions = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    operations = sum(direction["total_ios"] for direction in directions)
    mean = sum(direction["lat_ns"]["mean"] * direction["total_ios"] for direction in directions)
    if not operations:
        raise StorageError("fio completed no request. Run it by hand on the file to see why.")
    return Measurement(
        iops=sum(direction["iops"] for direction in directions),
        mean_ns=mean / operations,
        p99_ns=max(direction["clat_ns"]["percentile"]["99.000000"] for direction in directions),
        raw={"job options": job["job options"], "read": job["read"], "write": job["write"]},
    )


@dataclass(frozen=True, slots=True)
class Fio:
    """fio on `file`, bound to the server core."""

    file: Path
    cores: Cores

    @property
    def name(self) -> str:
        return "fio io_uring"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        done = subprocess.run(
            pinned(self.cores.server, command(self.file, shape, window)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise StorageError(f"fio ended with status {done.returncode}: {last_line(done.stderr)}")
        return parse(done.stdout)
