"""The gateway's configuration: a TOML file, and flags that override it. docs/cli.md is its reference."""

import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ringstone.errors import InvalidError, error_of_os
from ringstone.gateway.checks import check_name
from ringstone.gateway.paths import DEFAULT_CONFIG, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR
from ringstone.gateway.rights import UNSAID, SocketRights
from ringstone.listening import SETTINGS as LISTENING
from ringstone.listening import Listening, listening_of
from ringstone.state import LOCAL_HOST
from ringstone.state.settings import DEFAULT_PREFIX, EtcdSettings

LOG_LEVELS = ("debug", "info", "warning", "error")
_MOST_IDLE_US = 10_000_000
_LONGEST_BACKING_WAIT_S = 3600


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """`cores`: the CPUs of the reactors, one each. `idle_us`: how long a reactor polls without work before it
    sleeps. `socket`: the control API. `backing_wait_s`: how long a start waits for backings that somebody else
    still has. `balance`: queues move between reactors by
    measured load. `allow_test_pools`: accept pools that misbehave on purpose. `host`: the name of this one among all
    that share the state. `etcd`: where the state is; None is the database. `listening`: where the control API is served
    over TCP too. `socket_dirs`: where sockets of volumes may be, beside `vhost` in `run_dir`; `socket_rights`: who may
    connect to those whose attachment does not say it."""

    cores: tuple[int, ...]
    idle_us: int
    state_dir: Path
    run_dir: Path
    socket: Path
    log_level: str
    backing_wait_s: int = 30
    balance: bool = True
    allow_test_pools: bool = False
    host: str = LOCAL_HOST
    etcd: EtcdSettings | None = None
    listening: Listening | None = None
    socket_dirs: tuple[Path, ...] = ()
    socket_rights: SocketRights = UNSAID

    @property
    def database(self) -> Path:
        return self.state_dir / "ringstone.db"

    @property
    def stats_path(self) -> Path:
        return self.run_dir / "stats"

    @property
    def locks(self) -> tuple[Path, Path]:
        """One gateway per state directory, as two would serve the same volumes, and one per run directory."""
        return self.state_dir / "gateway.lock", self.run_dir / "gateway.lock"


@dataclass(frozen=True, slots=True)
class _Settings:
    """The table [gateway] of the file. It is checked by hand: a gateway that starts again after a crash would
    take longer to import a library for it than to serve its volumes."""

    cores: list[int] | str | None = None
    idle_us: int = 200
    state_dir: str = str(DEFAULT_STATE_DIR)
    run_dir: str = str(DEFAULT_RUN_DIR)
    socket: str | None = None
    socket_dirs: list[str] | str = ""
    socket_owner: str | None = None
    socket_group: str | None = None
    socket_mode: str | None = None
    log_level: str = "info"
    backing_wait_s: int = 30
    balance: bool = True
    host: str | None = None
    etcd: list[str] | str | None = None
    etcd_ca: str | None = None
    etcd_cert: str | None = None
    etcd_key: str | None = None
    etcd_user: str | None = None
    etcd_password_file: str | None = None
    etcd_prefix: str = DEFAULT_PREFIX
    listen: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None
    advertise: str | None = None
    insecure: bool = False

    def updated(self, values: Mapping[str, Any]) -> "_Settings":
        """With `values` in place of its own. ValueError names the first that is not right; an unknown one is
        refused, so that a typing error is not silently ignored."""
        known = {field.name for field in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{name} is no setting")
            if wrong := _wrong(name, value):
                raise ValueError(f"{name} is {value!r}, not {wrong}")
        return replace(self, **values)


def _wrong(name: str, value: object) -> str | None:
    """What a setting should be and is not."""
    if name == "cores":
        numbers = isinstance(value, list) and all(_between(item, 0, None) for item in value)
        return (
            None if numbers or isinstance(value, str) else "a list of CPU numbers, or a string such as 1,4-6"
        )
    if name == "idle_us":
        wanted = f"a whole number from 0 to {_MOST_IDLE_US}"
        return None if _between(value, 0, _MOST_IDLE_US) else wanted
    if name in ("balance", "insecure"):
        return None if isinstance(value, bool) else "true or false"
    if name == "backing_wait_s":
        wanted = f"a whole number from 0 to {_LONGEST_BACKING_WAIT_S}"
        return None if _between(value, 0, _LONGEST_BACKING_WAIT_S) else wanted
    if name in ("etcd", "socket_dirs"):
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        items = "URLs" if name == "etcd" else "directories"
        wanted = f"a list of {items}, or a string with commas between them"
        return None if texts or isinstance(value, str) else wanted
    example = {"socket_mode": ' such as "0660"'}.get(name, "")
    return None if isinstance(value, str) else f"a string{example}"


def _between(value: object, least: int, most: int | None) -> bool:
    # True and False are integers to Python, and no numbers to a person.
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= least and (most is None or value <= most)  # type: ignore[operator]


def parse_cores(text: str) -> list[int]:
    """CPU numbers of a list such as "1,4-6"; InvalidError when it is none."""
    cores: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            cores.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    except ValueError as error:
        raise InvalidError(f"{text!r} is not a list of CPUs; write one such as 1 or 1,4-6.") from error
    if not cores:
        raise InvalidError(f"{text!r} names no CPU; write a list such as 1 or 1,4-6.")
    return cores


def load_config(
    path: Path | None, flags: Mapping[str, Any], *, allow_test_pools: bool = False
) -> GatewayConfig:
    """The settings of the file at `path` (without one: DEFAULT_CONFIG if it exists), overridden by those
    `flags` that are not None. InvalidError names the setting that is wrong."""
    source = path or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    try:
        settings = _Settings().updated(_gateway_table(_read(source) if source else {}))
    except ValueError as error:
        raise InvalidError(
            f"{source} is not valid: {error}. Correct it; docs/cli.md lists the settings."
        ) from error
    try:
        settings = settings.updated({name: value for name, value in flags.items() if value is not None})
    except ValueError as error:
        raise InvalidError(f"A flag is not valid: {error}. See `ringstone gateway --help`.") from error
    return _resolved(settings, allow_test_pools)


def _gateway_table(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in tables:
        if name != "gateway":
            raise ValueError(f"{name} is no table; all settings are in [gateway]")
    table = tables.get("gateway", {})
    if not isinstance(table, dict):
        raise ValueError("gateway is no table; write [gateway]")
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise error_of_os(
            error, f"reading the configuration {path}", "Check the path given by --config."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidError(
            f"{path} is not TOML: {error}. Correct it, or remove it to use the defaults."
        ) from error


def _resolved(settings: _Settings, allow_test_pools: bool) -> GatewayConfig:
    if settings.log_level not in LOG_LEVELS:
        raise InvalidError(f"{settings.log_level!r} is not a log level; use one of {', '.join(LOG_LEVELS)}.")
    run_dir = _absolute("run_dir", settings.run_dir)
    socket = _absolute("socket", settings.socket) if settings.socket else run_dir / "gateway.sock"
    cores = parse_cores(settings.cores) if isinstance(settings.cores, str) else settings.cores
    return GatewayConfig(
        cores=_usable(cores),
        idle_us=settings.idle_us,
        state_dir=_absolute("state_dir", settings.state_dir),
        run_dir=run_dir,
        socket=socket,
        log_level=settings.log_level,
        backing_wait_s=settings.backing_wait_s,
        balance=settings.balance,
        allow_test_pools=allow_test_pools,
        host=_host(settings),
        etcd=_etcd(settings),
        listening=listening_of({name: getattr(settings, name) for name in LISTENING}),
        socket_dirs=tuple(_absolute("socket_dirs", path) for path in _items(settings.socket_dirs)),
        socket_rights=SocketRights(settings.socket_owner, settings.socket_group, settings.socket_mode),
    )


def _host(settings: _Settings) -> str:
    """A database has one host, which keeps what it has when the machine gets another name."""
    name = settings.host
    if name is None:
        name = LOCAL_HOST if settings.etcd is None else socket.gethostname()
    check_name("host", name)
    return name


def _etcd(settings: _Settings) -> EtcdSettings | None:
    if settings.etcd is None:
        return None

    def path(name: str) -> Path | None:
        value = getattr(settings, name)
        return None if value is None else _absolute(name, value)

    return EtcdSettings(
        endpoints=tuple(url.rstrip("/") for url in _items(settings.etcd)),
        ca=path("etcd_ca"),
        cert=path("etcd_cert"),
        key=path("etcd_key"),
        user=settings.etcd_user,
        password_file=path("etcd_password_file"),
        prefix=settings.etcd_prefix,
    )


def _items(setting: list[str] | str) -> list[str]:
    """Of a list, or of a string with commas."""
    items = setting.split(",") if isinstance(setting, str) else setting
    return [item.strip() for item in items if item.strip()]


def _absolute(name: str, path: str) -> Path:
    if not os.path.isabs(path):
        raise InvalidError(f"{name} is {path!r}, not an absolute path; begin it with /.")
    return Path(path)


def _usable(cores: list[int] | None) -> tuple[int, ...]:
    """Checked against the CPUs this process may use. The default is the last of them: the kernel gives the
    first ones most of the host's own interrupts."""
    allowed = os.sched_getaffinity(0)
    if cores is None:
        return (max(allowed),)
    if not cores or len(set(cores)) != len(cores):
        raise InvalidError(f"cores is {cores}; name at least one CPU, and each only once.")
    missing = sorted(set(cores) - allowed)
    if missing:
        raise InvalidError(
            f"This process may not use CPU {', '.join(map(str, missing))}; it may use "
            f"{', '.join(map(str, sorted(allowed)))}. Correct cores or the process's CPU affinity."
        )
    return tuple(cores)
