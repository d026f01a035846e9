"""The family of errors: one code, one exit code, and a document that says the same."""

import errno
import re
from pathlib import Path

import pytest

from ringstone import errors
from ringstone.errors import RingstoneError, error_of_code, error_of_os

CLI_PAGE = Path(__file__).resolve().parents[2] / "docs/cli.md"
# ringstone._engine.EngineError.code
ENGINE_CODES = (
    "exists",
    "not_found",
    "busy",
    "invalid",
    "no_device",
    "no_space",
    "unsupported",
    "io",
    "stopped",
    "failed",
)


def family() -> list[type[RingstoneError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, RingstoneError)]


def test_each_code_gives_its_error_back() -> None:
    for kind in family():
        assert type(error_of_code(kind.code, "x")) is kind
    assert type(error_of_code("from the future", "x")) is RingstoneError


def test_every_engine_code_has_an_error_of_its_own() -> None:
    assert {type(error_of_code(code, "x")) for code in ENGINE_CODES}.isdisjoint({RingstoneError})
    assert len({type(error_of_code(code, "x")) for code in ENGINE_CODES}) == len(ENGINE_CODES)


def test_the_documented_exit_codes_are_those_that_are_used() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", CLI_PAGE.read_text(), re.MULTILINE)
    assert sorted((kind.code, kind.exit_code) for kind in family()) == sorted(
        (code, int(n)) for n, code in rows
    )


def test_no_exit_code_means_success_or_wrong_usage() -> None:
    assert all(kind.exit_code not in (0, 2) for kind in family())


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, errors.NoDeviceError),
        (errno.ENOSPC, errors.NoSpaceError),
        (errno.EBUSY, errors.BusyError),
        (errno.EIO, errors.StorageError),
        (errno.EACCES, errors.StorageError),
    ],
)
def test_the_kernels_errors_are_translated(number: int, kind: type[RingstoneError]) -> None:
    error = error_of_os(OSError(number, "Because"), "making /x", "Try again.")
    assert type(error) is kind
    assert error.message == "Making /x failed: Because. Try again."


@pytest.mark.parametrize(
    ("number", "setting"),
    [(errno.EROFS, "ReadWritePaths="), (errno.EPERM, "DeviceAllow="), (errno.EACCES, None)],
)
def test_a_service_is_told_what_its_unit_may_forbid(
    monkeypatch: pytest.MonkeyPatch, number: int, setting: str | None
) -> None:
    """A confined gateway told to check a path's permissions, which were right."""
    error = OSError(number, "no")
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    told = str(error_of_os(error, "opening /x", "Check its permissions."))
    assert (setting or "Check its permissions.") in told
    monkeypatch.delenv("INVOCATION_ID")
    assert str(error_of_os(error, "opening /x", "Check its permissions.")).endswith("Check its permissions.")
