"""How long a person waits for a command: from the start of its process to the end of it, with a gateway that answers.

Most of that is Python importing libraries, so a Python that does nothing is measured beside it, and another build.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from ringstone.bench.daemon import GatewayDaemon
from ringstone.bench.machine import revision_of
from ringstone.bench.process import last_line
from ringstone.bench.results import Results, Row
from ringstone.bench.rings import require_ringstone
from ringstone.bench.setting import Setting
from ringstone.bench.spread import Bar, interleave
from ringstone.errors import InvalidError, RingstoneError

COMMAND = "ringstone bench commands"

_COMMANDS = (("volume", "list"), ("volume", "list", "--json"), ("volume", "show", "v0"))
_VOLUMES = 8
_VOLUME_BYTES = 1 << 20
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Program:
    """A build's `ringstone`, and the directory that Python finds its package in, if it is no installed one."""

    name: str
    path: Path
    python_path: Path | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """Of one process, by the clock and of the CPU."""

    wall_ms: float
    cpu_ms: float


def this_build() -> Program:
    """What the interpreter that runs this has installed. InvalidError when it has no `ringstone`."""
    return _checked(Program("this build", Path(sys.executable).with_name("ringstone")))


def other_build(path: Path) -> Program:
    """Another build: its program, or the directory that `pip install --target` made. InvalidError when it is
    neither."""
    if not path.is_dir():
        return _checked(Program("the other build", path.absolute()))
    require_ringstone(path)
    absolute = path.absolute()
    return _checked(Program("the other build", absolute / "bin" / "ringstone", absolute))


def commands(setting: Setting, results: Results, against: Program | None) -> None:
    """A row for each command; with `against` beside that build's, and otherwise beside a Python that does nothing."""
    section = "from the start of a command to its end"
    builds = [this_build()]
    if against is not None:
        builds.append(against)
        where = revision_of(against.path.parent) or (against.python_path or against.path).name
        results.notes.append(f"The other build: {where}")
    with _gateway(setting) as daemon, _on_core(setting.cores.client):
        for words in _COMMANDS:
            arguments = ["--socket", str(daemon.socket), *words]
            nothing = partial(_run, [sys.executable, "-c", "pass"], _environment(None))
            contenders = [nothing] + [
                partial(_run, [str(one.path), *arguments], _environment(one.python_path)) for one in builds
            ]
            for contender in contenders:
                # Whatever Python compiles when it first imports it.
                contender()
            taken: list[list[Run]] = [[] for _ in contenders]
            for turn, index, run in interleave(setting.plan.rounds, contenders):
                taken[index].append(run)
                if index + 1 == len(contenders):
                    setting.progress(f"{' '.join(words)}: round {turn + 1}/{setting.plan.rounds}")
            names = ["python -c pass", *(one.name for one in builds)]
            for name, runs in zip(names, taken, strict=True):
                results.keep_raw(section, name, {"command": list(words)}, [asdict(run) for run in runs])
            results.rows.append(_row(section, words, names, taken))


def _row(section: str, words: Sequence[str], names: Sequence[str], taken: Sequence[Sequence[Run]]) -> Row:
    """`taken`: of nothing, of this build and, if there is one, of the other."""
    nothing, ours, reference = taken[0], taken[1], taken[-1] if len(taken) > 2 else taken[0]
    cpu = [median(run.cpu_ms for run in runs) for runs in (reference, ours)]
    floor = median(run.wall_ms for run in nothing)
    return Row.beside(
        section,
        f"`{' '.join(words)}`",
        "ms",
        [run.wall_ms for run in ours],
        (names[2] if len(taken) > 2 else names[0], [run.wall_ms for run in reference]),
        f"CPU {cpu[0]:.0f} ms to {cpu[1]:.0f} ms; a Python that does nothing takes {floor:.0f} ms",
        Bar("at most 1.05 times", at_most=1.05) if len(taken) > 2 else None,
    )


@contextmanager
def _gateway(setting: Setting) -> Iterator[GatewayDaemon]:
    """One that has some volumes to tell of."""
    run, state = setting.directory / "run", setting.directory / "state"
    run.mkdir()
    state.mkdir()
    with GatewayDaemon(run, state, [setting.cores.server]) as daemon:
        daemon.start()
        daemon.make_pool("memory", "memory", setting.directory / "memory")
        with daemon.client() as client:
            for index in range(_VOLUMES):
                client.create_volume(f"v{index}", pool="memory", size=_VOLUME_BYTES)
            client.attach("v0", queues=1)
        yield daemon


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Children begin on the core that their parent is bound to."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _environment(python_path: Path | None) -> dict[str, str]:
    """This process's, without what would lead a command elsewhere."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RINGSTONE_")}
    return plain | ({"PYTHONPATH": str(python_path)} if python_path is not None else {})


def _run(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """RingstoneError when it fails."""
    began = time.monotonic_ns()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as child:
        assert child.stderr is not None
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        took = time.monotonic_ns() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RingstoneError(
            f"`{' '.join(command)}` ended with status {child.returncode}: {last_line(errors)}"
        )
    return Run(took / 1e6, (usage.ru_utime + usage.ru_stime) * 1e3)


def _checked(program: Program) -> Program:
    try:
        done = subprocess.run(
            [str(program.path), "--version"],
            env=_environment(program.python_path),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        said = done.stdout if done.returncode == 0 else ""
    except OSError:
        said = ""
    if not said.startswith("ringstone "):
        raise InvalidError(
            f"{program.path} is no `ringstone` that runs. Give the program of a build, such as "
            "DIRECTORY/.venv/bin/ringstone, or a directory that `pip install --target` made."
        )
    return program
