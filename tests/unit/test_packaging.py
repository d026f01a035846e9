"""What the Debian packages are called, which are refused, and that the manual has all of the command line."""

import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

import make_packages
import man_pages
from program_tree import SUITES, BuildError, _check_glibc
from ringstone.cli.app import app

PAGES = dict(man_pages.pages("2026-01-31"))


def commands() -> list[tuple[list[str], Any]]:
    """Every command that does something, with its words behind `ringstone`."""

    def below(words: list[str], command: Any) -> list[tuple[list[str], Any]]:
        inner = getattr(command, "commands", {})
        found = [] if inner and not command.invoke_without_command else [(words, command)]
        return found + [one for name in inner for one in below([*words, name], inner[name])]

    return below([], typer.main.get_command(app))[1:]


@pytest.mark.parametrize(
    ("words", "command"), [pytest.param(*one, id=" ".join(one[0])) for one in commands()]
)
def test_every_command_and_option_is_in_the_manual(words: list[str], command: Any) -> None:
    page = PAGES[f"ringstone-{words[0]}.1"].replace(r"\-", "-")
    assert f"ringstone {' '.join(words)}" in page
    for parameter in command.params:
        if parameter.name != "help" and not getattr(parameter, "hidden", False):
            assert all(option in page for option in parameter.opts if option.startswith("--")), parameter.opts
    assert " ".join(command.help.split("\n\n")[0].split()) in page


def test_the_first_page_names_all_others() -> None:
    page = PAGES["ringstone.1"].replace(r"\-", "-")
    assert all(rf"\fB{name.removesuffix('.1')}\fP(1)" in page for name in PAGES if name != "ringstone.1")


def test_pages_are_good_roff(tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is missing; `apt-get install groff-base` brings it.")
    for name, text in PAGES.items():
        formatted = subprocess.run(
            ["groff", "-man", "-Tascii", "-ww", "-z"], input=text, capture_output=True, text=True
        )
        assert (formatted.returncode, formatted.stderr) == (0, ""), name


def test_a_text_is_never_taken_for_markup() -> None:
    assert man_pages._paragraph(r"'a' or .b\c") == "\\&'a' or .b\\ec\n"


def newer(version: str, other: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", version, "gt", other]).returncode == 0


def test_builds_are_older_than_their_release_and_newer_than_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: dict[str, str] = {}
    monkeypatch.setattr(make_packages, "_git_says", lambda *words: said.get(words[0], ""))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    times = iter(("1700000000", "1700000009"))
    monkeypatch.setattr(make_packages, "run", lambda *words: next(times) if words[1] == "log" else "0123abcd")
    first, second = (make_packages.release_of(SUITES["bookworm"], None).version for _ in range(2))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000010")
    said["describe"] = "v"
    release = make_packages.release_of(SUITES["bookworm"], None).version
    said["status"] = " M README.md"
    modified = make_packages.release_of(SUITES["bookworm"], None).version
    trixie = make_packages.release_of(SUITES["trixie"], None).version
    order = [first, second, release, modified, trixie]
    assert all(newer(after, before) for before, after in itertools.pairwise(order)), order


def test_an_engine_that_the_suite_could_not_start_is_refused() -> None:
    wheel = Path("ringstone-0.1.0-cp311-abi3-manylinux_2_39_x86_64.whl")
    _check_glibc(wheel, SUITES["trixie"])
    with pytest.raises(BuildError, match=r"Debian bookworm has \(2\.36\)"):
        _check_glibc(wheel, SUITES["bookworm"])
