"""From the flags of `ringstone gateway` to the running process."""

from pathlib import Path

from ringstone.cli.quick import GatewayFlags


def start_gateway(flags: GatewayFlags) -> None:
    """Runs until the gateway is told to stop."""
    from ringstone.gateway.config import load_config
    from ringstone.gateway.daemon import run_gateway

    settings = flags.settings | ({"balance": False} if "no_balance" in flags.switches else {})
    config = load_config(
        Path(flags.config) if flags.config else None,
        settings,
        allow_test_pools="allow_test_pools" in flags.switches,
    )
    run_gateway(config, takeover="takeover" in flags.switches)
