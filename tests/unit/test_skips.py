"""A test that did not run says so, and why; it is not one that passed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# One that cannot run prints `skipped: REASON` before.
EARLY_END = re.compile(r"\breturn\s*[;}]")
TEST = re.compile(r"^( *)#\[test\]\n.*?^\1}$", re.MULTILINE | re.DOTALL)

CARGO = """#!/bin/sh
echo "$@" | grep -q -e '-- --show-output' || exit 1
echo 'test a_removed_reactor_says_so ... ok'
echo '---- a_removed_reactor_says_so stdout ----'
echo 'skipped: a second reactor takes a second core'
echo 'skipped: a second reactor takes a second core'
echo 'skipped: no huge pages'
echo 'test result: ok. 40 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s'
echo 'test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s'
"""


def test_rust_tests_that_did_not_run_are_counted_with_their_reasons(tmp_path: Path) -> None:
    """They were counted as passed."""
    cargo = tmp_path / "cargo"
    cargo.write_text(CARGO)
    cargo.chmod(0o755)
    done = subprocess.run(
        ["scripts/test-rust"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    *_, first, second, last = done.stdout.splitlines()
    assert last == "39 passed, 3 skipped, 1 ignored"
    assert {first, second} == {"2 skipped: a second reactor takes a second core", "1 skipped: no huge pages"}


def test_no_rust_test_ends_early_without_a_word() -> None:
    silent = []
    for path in ROOT.glob("crates/*/**/*.rs"):
        text = path.read_text()
        for test in TEST.finditer(text):
            if EARLY_END.search(test[0]) and '"skipped: ' not in text:
                silent.append(f"{path.relative_to(ROOT)}:{text[: test.start()].count(chr(10)) + 1}")
    assert not silent, f"Let these print `skipped: REASON` before they return: {silent}"


def test_python_tests_that_did_not_run_say_why(tmp_path: Path) -> None:
    test = tmp_path / "test_skipped.py"
    test.write_text('import pytest\n\n\ndef test_it():\n    pytest.skip("no such thing here")\n')
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-m", "", str(test)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "no such thing here" in done.stdout, done.stdout + done.stderr
