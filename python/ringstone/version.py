"""The version of this installation."""

from functools import cache


@cache
def version() -> str:
    """As the package was installed with. Looked up when somebody asks: that takes longer than a gateway may
    take to serve again after a crash."""
    from importlib import metadata

    try:
        return metadata.version("ringstone")
    except metadata.PackageNotFoundError:
        # Run from a source tree that was never installed.
        return "0+unknown"
