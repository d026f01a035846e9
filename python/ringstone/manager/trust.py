"""Whom a manager takes for a gateway. Names and URLs of hosts come from etcd, and whoever can write there may write
any: a URL says where to knock, and only the certificate says who opens."""

import re
from pathlib import Path

import httpx2

from ringstone.errors import UntrustedError
from ringstone.gateway.checks import NAME_PATTERN
from ringstone.loopback import is_loopback


def check_url(host: str, url: str, *, ca: Path | None) -> None:
    """UntrustedError when a token for `host` must not be sent to `url`. `ca`: who signs the gateways' certificates;
    with one they all have certificates, and without only this machine's own gateways may be without."""
    check_host(host)
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        parts = httpx2.URL("")
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo:
        raise UntrustedError(
            f"The gateway of host {host!r} announces {url!r}, which is no URL of a gateway. Correct advertise in its "
            "configuration, and see who may write to etcd."
        )
    if parts.scheme == "https":
        return
    if ca is None and is_loopback(parts.host):
        return
    reason = (
        "although gateway_ca is set" if ca is not None else "where everybody on the way would read the token"
    )
    raise UntrustedError(
        f"The gateway of host {host!r} announces {url}, which is without TLS, {reason}; so no token is sent there. Set "
        "tls_cert and tls_key in its configuration, and gateway_ca in the manager's."
    )


def check_host(host: str) -> None:
    """UntrustedError when that is no name of a host. It is what the certificate is compared with, and a file's name."""
    try:
        sound = re.fullmatch(NAME_PATTERN, host) is not None and bool(host.encode("idna"))
    except UnicodeError:
        sound = False
    if not sound or host.endswith("."):
        raise UntrustedError(
            f"{host!r} is no name that a certificate could have, so its gateway is not asked. Give it another one with "
            "host in its configuration."
        )
