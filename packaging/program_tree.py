"""What the package `ringstone` installs: /usr/lib/ringstone, a virtual environment with the locked Python packages and
the engine; the program in /usr/bin; manual pages and completion.

A virtual environment, as each process of Ringstone that starts another one (an upgrade, the supervisor, a benchmark)
does so with its own `sys.executable`, and finds the same modules by that and nothing else. Locked packages rather than
Debian's, as each suite has other versions, and none that the tests ran with.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PYTHON = ROOT / ".venv" / "bin" / "python"
HOME = "usr/lib/ringstone"
# -I: neither the caller's PYTHON... variables nor the program's directory are looked at. -S: nor is a sitecustomize of
# this machine's, and a start is 2 ms shorter; what `site` would find is what the program says itself.
PROGRAM = f"""\
#!/{HOME}/bin/python -IS
import sys

sys.path.insert(0, "/@SITE@")

from ringstone.cli import main

main()
"""
COMPLETION = {
    "bash": "usr/share/bash-completion/completions/ringstone",
    "zsh": "usr/share/zsh/vendor-completions/_ringstone",
    "fish": "usr/share/fish/vendor_completions.d/ringstone.fish",
}
_LOWEST_GLIBC = 17


class BuildError(Exception):
    """The packages cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Suite:
    """A release of Debian. `glibc` is the second number of its version 2.N."""

    name: str
    mark: str
    python: tuple[int, int]
    glibc: int

    @property
    def python_dependency(self) -> str:
        """Compiled modules and bytecode are for one version of Python."""
        major, minor = self.python
        return f"python3 (>= {major}.{minor}~), python3 (<< {major}.{minor + 1}~)"

    @property
    def site(self) -> str:
        return f"{HOME}/lib/python{self.python[0]}.{self.python[1]}/site-packages"

    @staticmethod
    def of_this_machine() -> "Suite":
        release = Path("/etc/os-release").read_text()
        found = re.search(r"^VERSION_CODENAME=(\S+)$", release, re.MULTILINE)
        if found is None or found[1] not in SUITES:
            raise BuildError(
                f"This machine has none of Debian's {' or '.join(SUITES)}; name one with --suite."
            )
        return SUITES[found[1]]


SUITES = {
    "bookworm": Suite("bookworm", "deb12", (3, 11), 36),
    "trixie": Suite("trixie", "deb13", (3, 13), 41),
}


def run(*command: str, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip())[-2000:]
        raise BuildError(f"`{' '.join(command)[:200]}` failed: {said}") from error
    except FileNotFoundError as error:
        raise BuildError(f"The program {command[0]} is missing; run `make setup`.") from error
    return done.stdout.strip()


def build_wheel(out: Path) -> Path:
    """The wheel of this checkout, in `out`."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        build = ("maturin", "build", "--release", "--locked", "--out", folder, "--interpreter", str(PYTHON))
        run(str(PYTHON.parent / build[0]), *build[1:])
        (made,) = Path(folder).iterdir()
        return made.replace(out / made.name)


def make_program(tree: Path, wheel: Path, suite: Suite, date: datetime) -> Path:
    """Everything but the package's control files and documents. The engine in it is returned."""
    _check_glibc(wheel, suite)
    site = tree / suite.site
    site.mkdir(parents=True)
    pip = (str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input")
    target = (*pip, "install", "--no-deps", "--no-index", "--no-compile", *_for(suite), "--target", str(site))
    run(
        *target,
        "--require-hashes",
        "--find-links",
        str(_locked_wheels(pip, suite)),
        "--requirement",
        str(LOCK),
    )
    run(*target, str(wheel))
    # Nobody needs the packages' programs here, and where a wheel came from is this machine's business.
    shutil.rmtree(site / "bin", ignore_errors=True)
    for name in ("direct_url.json", "INSTALLER", "REQUESTED"):
        for path in site.glob(f"*.dist-info/{name}"):
            path.unlink()

    home = tree / HOME
    (home / "bin").mkdir()
    (home / "bin/python").symlink_to("../../../bin/python3")
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {suite.python[0]}.{suite.python[1]}\n"
    )
    _compile(site, tree, suite)
    program = tree / "usr/bin/ringstone"
    program.parent.mkdir()
    program.write_text(PROGRAM.replace("@SITE@", suite.site))
    _manual(tree / "usr/share/man/man1", date)
    for shell, place in COMPLETION.items():
        script = run(
            str(PYTHON), "-P", "-m", "ringstone", environment={"_RINGSTONE_COMPLETE": f"source_{shell}"}
        )
        (tree / place).parent.mkdir(parents=True)
        (tree / place).write_text(f"{script}\n")
    return site / "ringstone/_engine.abi3.so"


def _check_glibc(wheel: Path, suite: Suite) -> None:
    """The wheel's name says the oldest C library that its engine starts with."""
    found = re.search(r"manylinux_2_(\d+)_", wheel.name)
    if found is None or int(found[1]) > suite.glibc:
        raise BuildError(
            f"{wheel.name} needs a newer C library than Debian {suite.name} has (2.{suite.glibc}); "
            f"build it on Debian {suite.name} or an older one."
        )


def _for(suite: Suite) -> list[str]:
    """pip's options for another Python than its own."""
    digits = f"{suite.python[0]}{suite.python[1]}"
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", digits]
    for abi in (f"cp{digits}", "abi3", "none"):
        options += ["--abi", abi]
    for minor in range(suite.glibc, _LOWEST_GLIBC - 1, -1):
        options += ["--platform", f"manylinux_2_{minor}_x86_64"]
    return [*options, "--platform", "manylinux2014_x86_64"]


def _locked_wheels(pip: tuple[str, ...], suite: Suite) -> Path:
    """A folder with the locked packages for the suite, fetched once for each lock."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    wheels = ROOT / ".cache" / "wheels" / f"{suite.name}-{digest}"
    if not wheels.exists():
        wheels.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheels.parent) as folder:
            fetched = Path(folder) / "wheels"
            run(
                *pip,
                "download",
                "--no-deps",
                "--require-hashes",
                *_for(suite),
                "--dest",
                str(fetched),
                "-r",
                str(LOCK),
            )
            fetched.rename(wheels)
    return wheels


def _compile(site: Path, tree: Path, suite: Suite) -> None:
    """Bytecode beside the modules: the unit forbids to write it later, and without it each start takes seconds.
    Unchecked: a module's time, by which Python tells whether it has changed, is that of the commit here."""
    python = _python_of(suite)
    run(
        *(*python, "-m", "compileall", "-q", "-j1", "--invalidation-mode", "unchecked-hash"),
        *("-s", str(tree), "-p", "/", str(site)),
    )
    run(
        *python,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(site)!r}); import ringstone.cli.app, ringstone.api.app",
    )


def _python_of(suite: Suite) -> tuple[str, ...]:
    """The command that runs the suite's Python."""
    if sys.version_info[:2] == suite.python:
        return (str(PYTHON),)
    name = f"python-{suite.name}"
    run("scripts/debian-root", name, suite.name, "python3")
    return ("scripts/in-root", name, "/usr/bin/python3")


def _manual(folder: Path, date: datetime) -> None:
    pages = Path(__file__).with_name("man_pages.py")
    run(str(PYTHON), str(pages), str(folder), "--date", date.date().isoformat())
    run("gzip", "-9n", *(str(path) for path in sorted(folder.iterdir())))


def split_debug_symbols(engine: Path, tree: Path) -> None:
    """Moves the engine's debug symbols to a package of their own, where gdb and coredumpctl look for them."""
    notes = run("readelf", "--notes", "--wide", str(engine))
    found = re.search(r"Build ID: ([0-9a-f]{2})([0-9a-f]+)", notes)
    if found is None:
        raise BuildError(f"{engine} has no build id, by which debuggers find its symbols.")
    symbols = tree / "usr/lib/debug/.build-id" / found[1] / f"{found[2]}.debug"
    symbols.parent.mkdir(parents=True)
    run("objcopy", "--only-keep-debug", "--compress-debug-sections", str(engine), str(symbols))
    run("strip", "--strip-unneeded", "--remove-section=.comment", "--remove-section=.note", str(engine))
