"""Children: one that answers lines of JSON, one that takes a job and gives a report, and what they cost."""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ringstone.errors import RingstoneError, UnsupportedError, error_of_code

_STOP_SECONDS = 10.0
_libc = ctypes.CDLL(None, use_errno=True)


class LineProcess:
    """A child that reads and writes lines of JSON and ends when its input does. `log` takes its standard
    error and, by its stem, names it in errors."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """`environment` is added to this process's own."""
        self._log = log
        self._name = log.stem
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | (environment or {}),
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            # receive() tells why it ended.
            return

    def receive(self) -> dict[str, Any]:
        """The next line; RingstoneError with the child's last words when it has ended."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RingstoneError(
                f"The {self._name} process ended with status {self._child.wait()}: "
                f"{last_line(self._log.read_text(errors='replace'))}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child's input and wait; one that does not end is killed."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        # One that had ended before breaks the pipe; its status is taken all the same.
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def module_command(module: str) -> list[str]:
    """How to run a module of this package with this interpreter."""
    return [sys.executable, "-m", f"ringstone.bench.{module}"]


def run_job(call: str, config: dict[str, Any]) -> Any:
    """Run `_engine.load` or `_engine.limit` in a child of its own and return its report; its errors become
    RingstoneError."""
    child = subprocess.run(
        module_command("client"),
        input=json.dumps({"call": call, "config": config}),
        capture_output=True,
        text=True,
        check=False,
    )
    return job_answer(child.stdout, child.stderr, child.returncode)


class HeldJob:
    """A load that goes on until it is released. `answer` is there from then on."""

    answer: Any = None

    def __init__(self, pid: int) -> None:
        self.pid = pid


@contextlib.contextmanager
def held_job(config: dict[str, Any]) -> Iterator[HeldJob]:
    """Run `_engine.load` in a child of its own. Entering returns when the load is ready; leaving releases it, and takes
    its report, or raises its error as a RingstoneError."""
    ready_read, ready_write = os.pipe()
    release_read, release_write = os.pipe()
    with os.fdopen(ready_read, "rb") as ready, os.fdopen(release_write, "wb") as release:
        fds = {"ready_fd": ready_write, "release_fd": release_read}
        with subprocess.Popen(
            module_command("client"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(ready_write, release_read),
        ) as client:
            os.close(ready_write)
            os.close(release_read)
            assert client.stdin is not None
            client.stdin.write(json.dumps({"call": "load", "config": config | fds}))
            client.stdin.close()
            client.stdin = None
            held = HeldJob(client.pid)
            try:
                # Nothing is read when the job ended before; its error is raised below.
                if ready.read(1):
                    yield held
            finally:
                release.close()
                output, errors = client.communicate()
                held.answer = job_answer(output, errors, client.returncode)


def job_answer(output: str, errors: str, status: int) -> Any:
    """The report in a client's output."""
    if status != 0 or not output:
        raise RingstoneError(f"The load generator ended with status {status}: {last_line(errors)}")
    answer = json.loads(output)
    if "error" in answer:
        raise error_of_code(answer["code"], answer["error"])
    return answer["report"]


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def pinned(core: int, command: Sequence[str]) -> list[str]:
    """`command` bound to a core, and ended with this process should that be killed."""
    return ["taskset", "-c", str(core), *tied(command)]


def tied(command: Sequence[str]) -> list[str]:
    """`command` ended with this process should that be killed."""
    return ["setpriv", "--pdeathsig", "TERM", *command]


def resident_bytes(pid: int) -> int:
    """Memory of a process that is present now."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Rss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None, "smaps_rollup begins with Rss"
    return int(found[1]) * 1024


def cpu_seconds(pid: int) -> float:
    """CPU time a process has used, exact to the nanosecond (clock_getcpuclockid)."""
    clock = ctypes.c_int()
    error = _libc.clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise UnsupportedError(
            f"The CPU time of process {pid} cannot be read: {os.strerror(error)}. See whether it still runs."
        )
    return time.clock_gettime(clock.value)


def cpu_share(pid: int, seconds: float) -> float:
    """Share of one core that a process uses for so long."""
    began, used = time.monotonic(), cpu_seconds(pid)
    time.sleep(seconds)
    return (cpu_seconds(pid) - used) / (time.monotonic() - began)
