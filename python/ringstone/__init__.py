"""Ringstone: fast, safe disks for virtual machines."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ringstone")
except PackageNotFoundError:
    # Run from a source tree that was never installed.
    __version__ = "0+unknown"
