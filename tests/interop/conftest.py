"""Fixtures of the tests with a real guest, and the marker that all of them have."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.guest import guest_host
from tests.framework.qemus import nothing_deprecated

__all__ = ["guest_host"]

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("guest")


@pytest.fixture(autouse=True)
def _nothing_deprecated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_deprecated(monkeypatch):
        yield
