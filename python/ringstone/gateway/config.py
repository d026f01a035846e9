"""The gateway's configuration: a TOML file, and flags that override it. docs/cli.md is its reference."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringstone.errors import InvalidError, error_of_os

DEFAULT_CONFIG = Path("/etc/ringstone/gateway.toml")
DEFAULT_STATE_DIR = Path("/var/lib/ringstone")
DEFAULT_RUN_DIR = Path("/run/ringstone")
DEFAULT_SOCKET = DEFAULT_RUN_DIR / "gateway.sock"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """`cores`: the CPUs of the reactors, one each. `idle_us`: how long a reactor polls without work before it
    sleeps. `socket`: the control API. `allow_test_pools`: accept pools that misbehave on purpose."""

    cores: tuple[int, ...]
    idle_us: int
    state_dir: Path
    run_dir: Path
    socket: Path
    log_level: str
    allow_test_pools: bool = False

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


class _Settings(BaseModel):
    """The table [gateway] of the file; unknown keys are refused, so that a typing error is not silently
    ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cores: list[Annotated[int, Field(ge=0)]] | str | None = None
    idle_us: int = Field(default=200, ge=0, le=10_000_000)
    state_dir: str = str(DEFAULT_STATE_DIR)
    run_dir: str = str(DEFAULT_RUN_DIR)
    socket: str | None = None
    log_level: str = "info"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    gateway: _Settings = _Settings()


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
    table = _read(source) if source else {}
    try:
        from_file = _File.model_validate(table)
    except ValidationError as error:
        raise InvalidError(
            f"{source} is not valid: {_first(error)}. Correct it; docs/cli.md lists the settings."
        ) from error
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = _Settings.model_validate(from_file.gateway.model_dump() | given)
    except ValidationError as error:
        raise InvalidError(
            f"A flag is not valid: {_first(error)}. See `ringstone gateway --help`."
        ) from error
    return _resolved(settings, allow_test_pools)


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


def _first(error: ValidationError) -> str:
    item = error.errors()[0]
    return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"


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
        allow_test_pools=allow_test_pools,
    )


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
