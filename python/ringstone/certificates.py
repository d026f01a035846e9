"""Whose certificates a client believes: the same on every Python."""

import ssl
from pathlib import Path


def trusting(ca: Path | None) -> ssl.SSLContext:
    """For a client of servers whose certificates `ca` (PEM) has signed, or one of the system's authorities.
    ssl.SSLError or OSError when that cannot be read.

    Python 3.13 asks of certificates all that RFC 5280 does, such as a `keyUsage` of an authority. That shuts out nobody
    whom the signatures do not, but it would part the hosts of a cluster when their Python is upgraded.
    """
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context
