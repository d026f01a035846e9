"""Write THIRD-PARTY.md: what of others Ringstone is built and run with, and under which licenses.

    .venv/bin/python scripts/third_party.py

Of everything in Cargo.lock and requirements.lock, by what each package says about itself. A test holds the file against
both and refuses a license that nobody has looked at yet, so this runs after every change of a lock.
"""

import json
import re
import subprocess
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Third-party software

Made by `scripts/third_party.py` from `Cargo.lock` and `requirements.lock`; do not edit. Each package's own source, from
crates.io or PyPI, has the text of its license and its copyright notices. QEMU, Ceph, etcd and other programs that are
only run, or loaded when they are there, are not part of Ringstone.
"""


def rust() -> list[tuple[str, str, str]]:
    done = subprocess.run(
        ["cargo", "metadata", "--locked", "--format-version", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    packages = [package for package in json.loads(done.stdout)["packages"] if package["source"]]
    # Some write a slash for OR, as cargo once had it.
    return sorted(
        (one["name"], one["version"], re.sub(r" ?/ ?", " OR ", one["license"] or "none said"))
        for one in packages
    )


def python() -> list[tuple[str, str, str]]:
    found = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    return [(name, version, _license(name)) for name, version in found]


def _license(name: str) -> str:
    said = metadata(name)
    classifiers = [
        line.rpartition(" :: ")[2] for line in said.get_all("Classifier", []) if line.startswith("License ::")
    ]
    short = said["License"] if len(said["License"] or "") < 60 else None
    return str(said["License-Expression"] or short or " AND ".join(classifiers) or "none said").removesuffix(
        " License"
    )


def table(title: str, packages: list[tuple[str, str, str]]) -> str:
    lines = [f"| {name} | {version} | {license} |" for name, version, license in packages]
    return "\n".join([f"\n## {title}\n", "| package | version | license |", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    text = HEAD + table("Rust", rust()) + table("Python", python())
    (ROOT / "THIRD-PARTY.md").write_text(text)
