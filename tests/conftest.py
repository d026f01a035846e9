"""Markers shared by all tests."""

import pytest

MARKERS = (
    "guest: boots a real Linux guest in QEMU",
    "soak: runs for long; only in `make soak`",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
