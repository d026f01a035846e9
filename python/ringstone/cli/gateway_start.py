"""From the flags of `ringstone gateway` to the running process."""

import os
import sys
from pathlib import Path

from ringstone.cli.quick import GatewayFlags


def start_gateway(flags: GatewayFlags) -> None:
    """Runs until the gateway, or its supervisor, is told to stop."""
    if "supervise" in flags.switches:
        _become_supervisor()
    from ringstone.gateway.config import load_config
    from ringstone.gateway.daemon import run_gateway

    settings = flags.settings | ({"balance": False} if "no_balance" in flags.switches else {})
    settings |= {"insecure": True} if "insecure" in flags.switches else {}
    config = load_config(
        Path(flags.config) if flags.config else None,
        settings,
        allow_test_pools="allow_test_pools" in flags.switches,
    )
    run_gateway(config, takeover="takeover" in flags.switches)


def _become_supervisor() -> None:
    """This process becomes ringstone.gateway.supervise, with nothing of ours loaded, for the same command line
    without --supervise."""
    supervisor = Path(__file__).parents[1] / "gateway" / "supervise.py"
    rest = [argument for argument in sys.argv[1:] if argument != "--supervise"]
    # -P: the directory it happens to be started in is no place to import from.
    gateway = [sys.executable, "-P", "-m", "ringstone", *rest]
    os.execv(sys.executable, [sys.executable, "-I", "-S", str(supervisor), "--", *gateway])
