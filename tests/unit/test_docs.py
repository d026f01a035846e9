"""What the documents promise is there: links, make targets, commands, crates and dependencies."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ringstone.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()

LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
MAKE = re.compile(r"(?:^    |`)make ([a-z][a-z-]*)", re.MULTILINE)
COMMAND = re.compile(r"(?:^    |\$\(|`)ringstone ([^#`&)\n]+)", re.MULTILINE)


def documents() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
    )


@documents()
def test_links_lead_somewhere(document: Path) -> None:
    broken = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert not broken


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md")} - {"README.md"}
    assert pages <= set(LINK.findall(index))


@documents()
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(MAKE.findall(document.read_text())) <= targets


def test_tests_that_make_names_exist() -> None:
    """`make test-lab` went on naming a file that had another name by then."""
    makefile = (ROOT / "Makefile").read_text()
    named = [
        prefix + name
        for prefix, names in re.findall(r"\$\(addprefix (tests/[^,]+),([^)]+)\)", makefile)
        for name in names.replace("\\\n", " ").split()
    ]
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


@documents()
def test_commands_are_accepted(document: Path) -> None:
    for line in COMMAND.findall(document.read_text()):
        words = line.split()
        # Typer carries a Click of its own, whose types are not for us.
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        if not words or words[0] in ("...", "--help"):
            continue
        # `ringstone gateway` does something by itself and has commands too.
        whole = words[0].startswith("-") or not hasattr(command, "commands")
        assert whole, f"`ringstone {line}`: no command {words[0]!r}"
        try:
            command.make_context(command.name, words)  # parses and converts, runs nothing
        except Exception as error:
            pytest.fail(f"`ringstone {line}`: {getattr(error, 'message', error)}")


def test_every_crate_is_explained() -> None:
    crates = {path.parent.name for path in ROOT.glob("crates/*/Cargo.toml")}
    assert crates == set(re.findall(r"crates/([a-z-]+)", ARCHITECTURE))


def test_every_dependency_has_its_reason() -> None:
    chosen: set[str] = set()
    for manifest in [*ROOT.glob("crates/*/Cargo.toml"), ROOT / "fuzz" / "Cargo.toml"]:
        cargo = tomllib.loads(manifest.read_text())
        for table in ("dependencies", "dev-dependencies", "build-dependencies"):
            chosen.update(name for name in cargo.get(table, {}) if not name.startswith("ringstone-"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        chosen.add(re.split(r"[^A-Za-z0-9_.-]", requirement)[0])
    reasons = ARCHITECTURE[ARCHITECTURE.index("## Dependencies") :]
    assert chosen <= set(re.findall(r"`([A-Za-z0-9_.-]+)`", reasons))
