"""Which addresses are this machine's own, where nobody is on the way."""

import socket

_OWN_IPV6 = socket.inet_pton(socket.AF_INET6, "::1")


def is_loopback(host: str) -> bool:
    """Of a numeric address. A name is not, whatever it begins with: who answers for it, others decide."""
    try:
        return socket.inet_pton(socket.AF_INET, host)[0] == 127
    except (OSError, ValueError):
        pass
    try:
        return socket.inet_pton(socket.AF_INET6, host) == _OWN_IPV6
    except (OSError, ValueError):
        return False
