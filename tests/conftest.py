"""Markers and fixtures shared by all tests."""

import signal

import pytest

from tests.framework.lab import ceph, lab, manager

__all__ = ["ceph", "lab", "manager"]

MARKERS = (
    "guest: boots a real Linux guest in QEMU",
    "soak: runs for long; only in `make soak`",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # A shell without job control has what it runs in the background ignore SIGINT, and so would what is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
