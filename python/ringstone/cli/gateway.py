"""`ringstone gateway`"""

from pathlib import Path
from typing import Annotated

import typer

from ringstone.cli.context import JsonOption, context_of, print_json
from ringstone.cli.gateway_start import start_gateway
from ringstone.cli.quick import GatewayFlags

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Configuration file (TOML); default /etc/ringstone/gateway.toml where it exists."
    ),
]

app = typer.Typer(
    invoke_without_command=True,
    subcommand_metavar="[COMMAND]",
    help="Run the gateway of this host, or upgrade it.",
)


@app.callback()
def gateway(
    context: typer.Context,
    config: ConfigOption = None,
    cores: Annotated[
        str | None,
        typer.Option(help="CPUs for the reactors, one each, such as 1 or 2,4-6; default the last CPU."),
    ] = None,
    idle_us: Annotated[
        int | None,
        typer.Option(help="Microseconds that a reactor polls without work before it sleeps; default 200."),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where state is kept; default /var/lib/ringstone.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where sockets and the stats page are; default /run/ringstone.")
    ] = None,
    socket_dirs: Annotated[
        str | None,
        typer.Option(
            metavar="DIRECTORIES",
            help="Where `volume attach --at` may put sockets, with commas; default only <run dir>/vhost.",
        ),
    ] = None,
    socket_owner: Annotated[
        str | None, typer.Option(help="User (or number) whose volumes' sockets are; default the gateway's.")
    ] = None,
    socket_group: Annotated[str | None, typer.Option(help="Their group; default the gateway's.")] = None,
    socket_mode: Annotated[
        str | None, typer.Option(help="Their mode; default 0600, or 0660 with a group.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error; default info.")
    ] = None,
    backing_wait_s: Annotated[
        int | None,
        typer.Option(
            help="Seconds that a start waits for backings that somebody else still has in use; default 30."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="This host's name among those that share the state; default its hostname."),
    ] = None,
    etcd: Annotated[
        str | None,
        typer.Option(help="Keep state in etcd: URLs of its members, with commas; default a local database."),
    ] = None,
    etcd_ca: Annotated[
        Path | None,
        typer.Option(help="Certificates (PEM) that etcd's are signed with; default the system's."),
    ] = None,
    etcd_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM) to show to etcd.")] = None,
    etcd_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    etcd_user: Annotated[str | None, typer.Option(help="User of etcd.")] = None,
    etcd_password_file: Annotated[Path | None, typer.Option(help="File with that user's password.")] = None,
    etcd_prefix: Annotated[
        str | None, typer.Option(help="What all keys begin with; default /ringstone/.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="Serve the API over TCP too, such as 10.0.0.1:7480, to those who have a token."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM) of that address.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the tokens, one a line.")] = None,
    advertise: Annotated[
        str | None, typer.Option(help="The URL under which others reach it; default from --listen.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS, though the address is not this machine's alone.")
    ] = False,
    supervise: Annotated[
        bool,
        typer.Option(
            "--supervise",
            help="Start it again whenever it ends or hangs; for hosts without a service manager.",
        ),
    ] = False,
    takeover: Annotated[
        bool,
        typer.Option(
            "--takeover",
            help="Go on with what the running gateway serves, which then ends; see `ringstone gateway upgrade`.",
        ),
    ] = False,
    no_balance: Annotated[
        bool, typer.Option("--no-balance", help="Leave queues on the reactor where they were put first.")
    ] = False,
    allow_test_pools: Annotated[bool, typer.Option("--allow-test-pools", hidden=True)] = False,
) -> None:
    """Run the gateway of this host in the foreground, until SIGTERM or Ctrl-C.

    Its control API listens on <run dir>/gateway.sock, or on the global --socket where that is given.
    """
    settings = {
        "cores": cores,
        "idle_us": idle_us,
        "state_dir": _absolute(state_dir),
        "run_dir": _absolute(run_dir),
        "socket": _given_socket(context),
        "socket_dirs": socket_dirs,
        "socket_owner": socket_owner,
        "socket_group": socket_group,
        "socket_mode": socket_mode,
        "log_level": log_level,
        "backing_wait_s": backing_wait_s,
        "host": host,
        "etcd": etcd,
        "etcd_ca": _absolute(etcd_ca),
        "etcd_cert": _absolute(etcd_cert),
        "etcd_key": _absolute(etcd_key),
        "etcd_user": etcd_user,
        "etcd_password_file": _absolute(etcd_password_file),
        "etcd_prefix": etcd_prefix,
        "listen": listen,
        "tls_cert": _absolute(tls_cert),
        "tls_key": _absolute(tls_key),
        "token_file": _absolute(token_file),
        "advertise": advertise,
    }
    if context.invoked_subcommand is not None:
        return
    switches = {
        "allow_test_pools": allow_test_pools,
        "supervise": supervise,
        "takeover": takeover,
        "no_balance": no_balance,
        "insecure": insecure,
    }
    start_gateway(
        GatewayFlags(
            settings={name: value for name, value in settings.items() if value is not None},
            config=str(config) if config else None,
            switches={name for name, given in switches.items() if given},
        )
    )


@app.command("upgrade")
def upgrade(context: typer.Context, json_output: JsonOption = False) -> None:
    """Put a new process, of the Ringstone that runs this command, in the place of the running gateway.

    Guests' requests pause for milliseconds and nothing reconnects. If the new process fails, the old one goes on.
    """
    from ringstone.client import GatewayClient
    from ringstone.gateway.upgrade import upgrade as replace

    cli = context_of(context, json_output)
    # The new process starts here, so it is this host's gateway whatever RINGSTONE_MANAGER says.
    with GatewayClient(cli.socket) as client:
        report = replace(client)
    if cli.json:
        print_json(report)
        return
    print(
        f"Release {report.from_version} was replaced by {report.to_version}: {report.volumes} volumes, whose requests "
        f"paused for {report.stall_ms:.1f} ms."
    )


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path else None


def _given_socket(context: typer.Context) -> str | None:
    """The global --socket only where a person gave it: its default follows the run directory here."""
    root = context.find_root()
    source = root.get_parameter_source("socket")
    if source is None or source.name == "DEFAULT":
        return None
    return str(Path(root.params["socket"]).absolute())
