"""`ringstone`: the command line. A file per noun; docs/cli.md has the reference and the exit codes."""

import sys
from collections.abc import Sequence

from ringstone.errors import RingstoneError


def main() -> None:
    """The entry point: runs the command, and turns an error into one line on standard error and its exit
    code."""
    from ringstone.cli.quick import gateway_flags

    try:
        flags = gateway_flags(sys.argv[1:])
        if flags is not None:
            from ringstone.cli.gateway_start import start_gateway

            start_gateway(flags)
        elif not _listed(sys.argv[1:]):
            from ringstone.cli.app import app

            # The name also where Python runs the package: usage and completion depend on it.
            app(prog_name="ringstone")
    except RingstoneError as error:
        if "--json" in sys.argv:
            import json

            print(json.dumps({"code": error.code, "message": error.message}), file=sys.stderr)
        else:
            print(f"ringstone: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)


def _listed(arguments: Sequence[str]) -> bool:
    """Whether that was all; otherwise nothing was printed, and it is left to the real command."""
    from ringstone.cli.quick_list import list_flags

    flags = list_flags(arguments)
    if flags is None:
        return False
    from ringstone.cli.list_start import list_volumes

    try:
        return list_volumes(flags)
    except KeyboardInterrupt:
        # As Typer has it.
        sys.exit(130)
