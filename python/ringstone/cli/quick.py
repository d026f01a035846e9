"""`ringstone gateway` without the command line's libraries, which take longer to import than the gateway takes to
serve: after a crash guests wait for it.

Only what a unit file or a supervisor writes is understood here. Whatever else there is (help, errors, completion)
is left to the real command, ringstone.cli.gateway.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def _path(text: str) -> str:
    return os.path.abspath(text)


_VALUES: dict[str, Callable[[str], Any]] = {
    "config": str,
    "cores": str,
    "idle_us": int,
    "state_dir": _path,
    "run_dir": _path,
    "socket_dirs": str,
    "socket_owner": str,
    "socket_group": str,
    "socket_mode": str,
    "log_level": str,
    "backing_wait_s": int,
    "host": str,
    "etcd": str,
    "etcd_ca": _path,
    "etcd_cert": _path,
    "etcd_key": _path,
    "etcd_user": str,
    "etcd_password_file": _path,
    "etcd_prefix": str,
    "listen": str,
    "tls_cert": _path,
    "tls_key": _path,
    "token_file": _path,
    "advertise": str,
}
_SWITCHES = ("allow_test_pools", "supervise", "takeover", "no_balance", "insecure")


@dataclass(slots=True)
class GatewayFlags:
    """What was given on the command line. `settings` has those of ringstone.gateway.config."""

    settings: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    switches: set[str] = field(default_factory=set)


def gateway_flags(arguments: Sequence[str]) -> GatewayFlags | None:
    """The flags of `[--socket PATH] gateway ...`; None where the real command must look at it."""
    rest = list(arguments)
    flags = GatewayFlags()
    if rest[:1] == ["--socket"] and len(rest) > 1:
        flags.settings["socket"] = _path(rest[1])
        del rest[:2]
    elif "RINGSTONE_SOCKET" in os.environ:
        return None
    if rest[:1] != ["gateway"]:
        return None
    del rest[:1]
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or "_" in option:
            return None
        if name in _SWITCHES and not equals:
            flags.switches.add(name)
            continue
        if name not in _VALUES or not (equals or rest):
            return None
        try:
            flags.settings[name] = _VALUES[name](value if equals else rest.pop(0))
        except ValueError:
            return None
    flags.config = flags.settings.pop("config", None)
    return flags
