"""The manager's configuration: a TOML file, and flags that override it. docs/operations/cluster.md is its reference."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ringstone.errors import InvalidError, error_of_os
from ringstone.listening import SETTINGS as LISTENING
from ringstone.listening import Listening, listening_of
from ringstone.manager.tokens import GatewayTokens
from ringstone.state.settings import DEFAULT_PREFIX, EtcdSettings

DEFAULT_CONFIG = Path("/etc/ringstone/manager.toml")
DEFAULT_LISTEN = "127.0.0.1:7481"
LOG_LEVELS = ("debug", "info", "warning", "error")
_PATHS = (
    "gateway_token_file",
    "gateway_token_dir",
    "gateway_ca",
    "etcd_ca",
    "etcd_cert",
    "etcd_key",
    "etcd_password_file",
)
_LONGEST_GRACE_S = 86_400


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    """`listening`: the API. `gateway_tokens` are shown to the gateways, whose certificates `gateway_ca` has signed.
    `failover_grace_s`: how long a host stays dead before what is attached there with `ha` is taken over; None is
    never."""

    listening: Listening
    etcd: EtcdSettings
    gateway_tokens: GatewayTokens
    gateway_ca: Path | None = None
    failover_grace_s: float | None = 0.0
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class _Settings:
    """The table [manager] of the file."""

    listen: str = DEFAULT_LISTEN
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None
    advertise: str | None = None
    insecure: bool = False
    gateway_token_file: str | None = None
    gateway_token_dir: str | None = None
    gateway_ca: str | None = None
    failover: bool = True
    failover_grace_s: float = 0.0
    etcd: list[str] | str | None = None
    etcd_ca: str | None = None
    etcd_cert: str | None = None
    etcd_key: str | None = None
    etcd_user: str | None = None
    etcd_password_file: str | None = None
    etcd_prefix: str = DEFAULT_PREFIX
    log_level: str = "info"

    def updated(self, values: Mapping[str, Any]) -> "_Settings":
        """With `values` in place of its own. ValueError names the first that is not right."""
        known = {field.name for field in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{name} is no setting")
            if wrong := _wrong(name, value):
                raise ValueError(f"{name} is {value!r}, not {wrong}")
        return replace(self, **values)


def _wrong(name: str, value: object) -> str | None:
    """What a setting should be and is not."""
    if name in ("insecure", "failover"):
        return None if isinstance(value, bool) else "true or false"
    if name == "failover_grace_s":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and 0 <= value <= _LONGEST_GRACE_S else "a number of seconds"  # type: ignore[operator]
    if name == "etcd" and isinstance(value, list):
        return None if all(isinstance(url, str) for url in value) else "a list of URLs"
    if name in _PATHS and not (isinstance(value, str) and value.startswith("/")):
        return "an absolute path; begin it with /"
    return None if isinstance(value, str) else "a string"


def load_config(path: Path | None, flags: Mapping[str, Any]) -> ManagerConfig:
    """The settings of the file at `path` (without one: DEFAULT_CONFIG if it exists), overridden by those
    `flags` that are not None. InvalidError names the setting that is wrong."""
    source = path or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    try:
        settings = _Settings().updated(_table(source) if source else {})
    except ValueError as error:
        raise InvalidError(
            f"{source} is not valid: {error}. Correct it; docs/operations/cluster.md lists the settings."
        ) from error
    try:
        settings = settings.updated({name: value for name, value in flags.items() if value is not None})
    except ValueError as error:
        raise InvalidError(f"A flag is not valid: {error}. See `ringstone manager --help`.") from error
    return _resolved(settings)


def _table(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise error_of_os(error, f"reading the configuration {path}", "Check --config.") from error
    for name, table in tables.items():
        if name != "manager" or not isinstance(table, dict):
            raise ValueError(f"{name} is no table of it; all settings are in [manager]")
    found: Mapping[str, Any] = tables.get("manager", {})
    return found


def _resolved(settings: _Settings) -> ManagerConfig:
    if settings.log_level not in LOG_LEVELS:
        raise InvalidError(f"{settings.log_level!r} is not a log level; use one of {', '.join(LOG_LEVELS)}.")
    if settings.etcd is None:
        raise InvalidError(
            "etcd is not set, and a manager has its state from there. Name the members that the gateways use, such as "
            'etcd = ["https://10.0.0.1:2379"].'
        )
    if settings.gateway_token_file is None and settings.gateway_token_dir is None:
        raise InvalidError(
            "Neither gateway_token_dir nor gateway_token_file is set. Name a directory with a file for each host, or "
            "one file for all, with a token of the gateways' token_file, which lets the manager use them."
        )
    listening = listening_of({name: getattr(settings, name) for name in LISTENING})
    assert listening is not None, "listen has a default"
    return ManagerConfig(
        listening=listening,
        etcd=_etcd(settings, settings.etcd),
        gateway_tokens=GatewayTokens(_path(settings.gateway_token_file), _path(settings.gateway_token_dir)),
        gateway_ca=_path(settings.gateway_ca),
        failover_grace_s=settings.failover_grace_s if settings.failover else None,
        log_level=settings.log_level,
    )


def _etcd(settings: _Settings, etcd: list[str] | str) -> EtcdSettings:
    urls = etcd.split(",") if isinstance(etcd, str) else etcd
    return EtcdSettings(
        endpoints=tuple(url.strip().rstrip("/") for url in urls),
        ca=_path(settings.etcd_ca),
        cert=_path(settings.etcd_cert),
        key=_path(settings.etcd_key),
        user=settings.etcd_user,
        password_file=_path(settings.etcd_password_file),
        prefix=settings.etcd_prefix,
    )


def _path(value: str | None) -> Path | None:
    return Path(value) if value is not None else None
