"""Make the Debian packages of this checkout, and the wheel they are made of, in dist/: `make package`.

    .venv/bin/python packaging/make_packages.py [--suite bookworm|trixie] [--version VERSION] [--out FOLDER]

Three packages, whose control files and maintainer scripts are in packaging/debian, and the engine's debug symbols:

- ringstone has the program, its engine and the Python packages it is locked to, in a directory of its own;
- ringstone-gateway and ringstone-manager have a unit and its configuration each.

The same commit and the same tools make the same bytes: times are the commit's, and names are sorted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from program_tree import ROOT, SUITES, BuildError, Suite, build_wheel, make_program, run, split_debug_symbols

HERE = Path(__file__).resolve().parent
DEBIAN = HERE / "debian"
DEPLOY = ROOT / "deploy"
UNITS = "usr/lib/systemd/system"
MAINTAINER = "Ringstone maintainers <maintainers@ringstone.invalid>"
SCRIPTS = ("preinst", "postinst", "prerm", "postrm")


@dataclass(frozen=True)
class Release:
    """What is packaged, for which Debian. `epoch`: seconds, the time of everything in it."""

    suite: Suite
    version: str
    epoch: int

    @property
    def date(self) -> datetime:
        return datetime.fromtimestamp(self.epoch, UTC)


def release_of(suite: Suite, version: str | None) -> Release:
    """That of this checkout. A commit that no tag calls a release has a version before the release's, and after those
    of older commits, so that apt takes builds in their order."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct"))
    if version is None:
        number = _cargo_version()
        if not _git_says("describe", "--exact-match", "--match", f"v{number}"):
            moment = datetime.fromtimestamp(epoch, UTC).strftime("%Y%m%d%H%M%S")
            number += f"~git{moment}.{run('git', 'rev-parse', '--short=8', 'HEAD')}"
        if _git_says("status", "--porcelain", "--untracked-files=no"):
            number += "+modified"
        version = f"{number}-1~{suite.mark}"
    return Release(suite, version, epoch)


def _cargo_version() -> str:
    manifest = (ROOT / "Cargo.toml").read_text().partition("[workspace.package]")[2]
    return manifest.partition('version = "')[2].partition('"')[0]


def _git_says(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def make_packages(release: Release, out: Path) -> list[Path]:
    """The wheel and the packages, in `out`."""
    # Everything that is started here takes its times from it: maturin, dpkg-deb.
    os.environ["SOURCE_DATE_EPOCH"] = str(release.epoch)
    # As the Makefile says it, so that Cargo finds the engine that `make engine` has built.
    os.environ["VIRTUAL_ENV"] = str(ROOT / ".venv")
    out.mkdir(parents=True, exist_ok=True)
    made = [build_wheel(out)]
    # In the checkout, where a Python of another suite sees it too.
    (ROOT / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="packages-", dir=ROOT / ".cache") as folder:
        work = Path(folder)
        program = work / "ringstone"
        engine = make_program(program, made[0], release.suite, release.date)
        split_debug_symbols(engine, work / "ringstone-dbgsym")
        _put(program, "usr/share/doc/ringstone/README.md", (ROOT / "README.md").read_bytes())
        _put(program, "usr/share/doc/ringstone/THIRD-PARTY.md", (ROOT / "THIRD-PARTY.md").read_bytes())
        for page in sorted((ROOT / "docs").rglob("*.md")):
            _put(program, f"usr/share/doc/ringstone/{page.relative_to(ROOT)}", page.read_bytes())

        gateway, manager = work / "ringstone-gateway", work / "ringstone-manager"
        for tree in (gateway, manager):
            unit = f"{tree.name}.service"
            _put(tree, f"{UNITS}/{unit}", (DEPLOY / unit).read_bytes())
        _put(gateway, "etc/ringstone/gateway.toml", (DEPLOY / "gateway.toml").read_bytes())
        for example in sorted((DEPLOY / "examples").iterdir()):
            _put(gateway, f"usr/share/doc/ringstone-gateway/examples/{example.name}", example.read_bytes())
        _put(
            manager,
            "usr/share/doc/ringstone-manager/examples/manager.toml",
            (DEPLOY / "manager.toml").read_bytes(),
        )
        for tree in (program, work / "ringstone-dbgsym", gateway, manager):
            made.append(_build(tree, release, out))
    return made


def _build(tree: Path, release: Release, out: Path) -> Path:
    """One package of a tree whose folder has its name."""
    name = tree.name
    documents = f"usr/share/doc/{name}"
    if name == "ringstone-dbgsym":
        # As Debian's own packages of symbols have it.
        (tree / "usr/share/doc").mkdir(parents=True)
        (tree / documents).symlink_to("ringstone")
    else:
        _put(tree, f"{documents}/copyright", (DEBIAN / "copyright").read_bytes())
        _put_compressed(tree, f"{documents}/changelog.gz", (ROOT / "CHANGELOG.md").read_bytes())
        _put_compressed(tree, f"{documents}/changelog.Debian.gz", _debian_changelog(release).encode())
    overrides = DEBIAN / name / "lintian-overrides"
    if overrides.exists():
        _put(tree, f"usr/share/lintian/overrides/{name}", overrides.read_bytes())

    paths = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    kibibytes = sum((path.stat().st_size + 1023) // 1024 for path in paths)
    control = tree / "DEBIAN"
    control.mkdir()
    fields = (DEBIAN / name / "control").read_text()
    for word, value in {
        "@VERSION@": release.version,
        "@MAINTAINER@": MAINTAINER,
        "@PYTHON@": release.suite.python_dependency,
        "@SIZE@": str(kibibytes),
    }.items():
        fields = fields.replace(word, value)
    (control / "control").write_text(fields)
    settings = [path for path in paths if path.is_relative_to(tree / "etc")]
    if settings:
        (control / "conffiles").write_text("".join(f"/{path.relative_to(tree)}\n" for path in settings))
    sums = run("md5sum", *(str(path.relative_to(tree)) for path in paths), cwd=tree)
    (control / "md5sums").write_text(f"{sums}\n")
    for script in SCRIPTS:
        if (DEBIAN / name / script).exists():
            (control / script).write_bytes((DEBIAN / name / script).read_bytes())
    _settle(tree, release.epoch)
    (out / f"{name}_{release.version}_amd64.deb").unlink(missing_ok=True)
    run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(out))
    return out / f"{name}_{release.version}_amd64.deb"


def _debian_changelog(release: Release) -> str:
    return (
        f"ringstone ({release.version}) {release.suite.name}; urgency=medium\n\n"
        "  * What has changed is in changelog.gz.\n\n"
        f" -- {MAINTAINER}  {release.date.strftime('%a, %d %b %Y %H:%M:%S +0000')}\n"
    )


def _put(tree: Path, place: str, content: bytes) -> None:
    target = tree / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _put_compressed(tree: Path, place: str, content: bytes) -> None:
    # -n: neither the name nor the time of what is compressed.
    _put(tree, place, subprocess.run(["gzip", "-9n"], input=content, capture_output=True, check=True).stdout)


def _settle(tree: Path, epoch: int) -> None:
    """The modes and times of everything, whatever this user's umask and clock say."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            runs = path.is_dir() or path.name in SCRIPTS or path.parent == tree / "usr/bin"
            path.chmod(0o755 if runs else 0o644)
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make the Debian packages and the wheel.")
    parser.add_argument(
        "--suite", choices=sorted(SUITES), help="The Debian to make them for; default this machine's"
    )
    parser.add_argument("--version", help="The packages' version; default by the commit")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="Where they are put; default dist")
    given = parser.parse_args(arguments)
    try:
        suite = SUITES[given.suite] if given.suite else Suite.of_this_machine()
        for path in make_packages(release_of(suite, given.version), given.out.resolve()):
            print(f"{path.stat().st_size >> 10:7} KiB  {path}")
    except BuildError as error:
        print(f"make_packages: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
