"""Where a gateway keeps things unless it is told otherwise."""

from pathlib import Path

DEFAULT_CONFIG = Path("/etc/ringstone/gateway.toml")
DEFAULT_STATE_DIR = Path("/var/lib/ringstone")
DEFAULT_RUN_DIR = Path("/run/ringstone")
DEFAULT_SOCKET = DEFAULT_RUN_DIR / "gateway.sock"
