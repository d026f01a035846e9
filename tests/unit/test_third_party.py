"""What of others is in the product: from where, under which licenses, and that THIRD-PARTY.md names all of it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKE = "run .venv/bin/python scripts/third_party.py"
# Permissive ones, and of file-wise copyleft only what is used unchanged.
ALLOWED = {
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "MIT",
    "MPL-2.0",
    "NCSA",
    "PSF-2.0",
    "Unicode-3.0",
    "Unlicense",
}
# Chosen one by one. This is a library, used unchanged; its one file under the GPL, legacy.py, is not imported.
ALLOWED_FOR = {
    "qemu-qmp": "GNU Lesser General Public License v2 or later (LGPLv2+) AND GNU General Public License v2 (GPLv2)"
}
CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"


def named(title: str) -> dict[tuple[str, str], str]:
    text = (ROOT / "THIRD-PARTY.md").read_text()
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\S+) \| (\d\S*) \| (.+) \|$", section, re.MULTILINE)
    return {(name, version): license for name, version, license in rows}


def locked_crates() -> list[dict[str, str]]:
    packages: list[dict[str, str]] = tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]
    return [package for package in packages if not package["name"].startswith("ringstone-")]


def allowed(expression: str) -> bool:
    """Whether an SPDX expression can be met: one side of each OR, every side of each AND."""
    inner = re.sub(
        r"\(([^()]*)\)",
        lambda group: "MIT" if allowed(group[1]) else "refused",
        expression.replace("/", " OR "),
    )
    return all(any(one.strip() in ALLOWED for one in part.split(" OR ")) for part in inner.split(" AND "))


def test_the_notice_names_what_is_locked() -> None:
    crates = {(package["name"], package["version"]) for package in locked_crates()}
    assert named("Rust").keys() == crates, MAKE
    lock = (ROOT / "requirements.lock").read_text()
    assert named("Python").keys() == set(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE)), MAKE


def imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_only_what_is_locked_is_imported() -> None:
    """The tests have more installed, such as `httpx` for an older release: there a slip would pass."""
    files = (ROOT / "python" / "ringstone").rglob("*.py")
    names = {name for path in files for name in imported(path.read_text())}
    locked = {re.split("[-.]", name)[0] for name, _ in named("Python")} | {"pydantic_core"}
    # Debian's, of a script that the lab runs with Debian's Python.
    assert names - locked - sys.stdlib_module_names == {"ringstone", "rados"}


def test_everything_comes_from_where_it_cannot_be_exchanged() -> None:
    for package in locked_crates():
        assert package.get("source") == CRATES_IO, package["name"]
        assert re.fullmatch("[0-9a-f]{64}", package["checksum"]), package["name"]


def test_every_license_is_one_that_was_looked_at() -> None:
    all_of_it = named("Rust") | named("Python")
    refused = {
        name: license
        for (name, _), license in all_of_it.items()
        if not allowed(license) and ALLOWED_FOR.get(name) != license
    }
    assert not refused, "Look at these licenses, then allow them here or do without the package."


def test_license_expressions_are_read() -> None:
    assert allowed("MIT OR GPL-3.0-only")
    assert allowed("(MIT OR GPL-3.0-only) AND BSD-3-Clause")
    assert not allowed("(MIT OR Apache-2.0) AND GPL-3.0-only")
    assert not allowed("none said")


def test_cargo_deny_allows_nothing_more() -> None:
    listed = set(tomllib.loads((ROOT / "deny.toml").read_text())["licenses"]["allow"])
    assert listed <= ALLOWED
