"""`ringstone manager`"""

from pathlib import Path
from typing import Annotated

import typer


def manager(
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration file (TOML); default /etc/ringstone/manager.toml where it exists."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Where the API is, such as 10.0.0.1:7481; default 127.0.0.1:7481.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM) of that address.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the tokens of its clients, one a line.")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="The URL under which others reach it; default from --listen.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS, though the address is not this machine's alone.")
    ] = False,
    gateway_token_file: Annotated[
        Path | None, typer.Option(help="File with the token that the gateways want.")
    ] = None,
    gateway_token_dir: Annotated[
        Path | None, typer.Option(help="Directory with such a file for each host, under its name.")
    ] = None,
    gateway_ca: Annotated[
        Path | None,
        typer.Option(help="Certificates (PEM) that the gateways' are signed with; default the system's."),
    ] = None,
    no_failover: Annotated[bool, typer.Option("--no-failover", help="Take nothing over by itself.")] = False,
    failover_grace_s: Annotated[
        float | None,
        typer.Option(help="Seconds that a host stays dead before its volumes are taken over; default 0."),
    ] = None,
    etcd: Annotated[
        str | None, typer.Option(help="The cluster's etcd: URLs of its members, with commas.")
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
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error; default info.")
    ] = None,
) -> None:
    """Run a manager in the foreground, until SIGTERM or Ctrl-C: one API over all hosts of a cluster, and failover.

    It keeps nothing of its own. Run several, on different machines; clients may use any of them.
    """
    from ringstone.manager.config import load_config
    from ringstone.manager.server import run_manager

    paths = {
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "token_file": token_file,
        "gateway_token_file": gateway_token_file,
        "gateway_token_dir": gateway_token_dir,
        "gateway_ca": gateway_ca,
        "etcd_ca": etcd_ca,
        "etcd_cert": etcd_cert,
        "etcd_key": etcd_key,
        "etcd_password_file": etcd_password_file,
    }
    flags = {
        "listen": listen,
        "advertise": advertise,
        "insecure": insecure or None,
        "failover": False if no_failover else None,
        "failover_grace_s": failover_grace_s,
        "etcd": etcd,
        "etcd_user": etcd_user,
        "etcd_prefix": etcd_prefix,
        "log_level": log_level,
        **{name: str(path.absolute()) if path else None for name, path in paths.items()},
    }
    run_manager(load_config(config, flags))
