"""`ringstone state`: the state as a file, to move it between the database and etcd."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ringstone.cli.gateway import ConfigOption

app = typer.Typer(no_args_is_help=True, help="Export and import the state.")

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A JSON file.")]
StateDirOption = Annotated[
    str | None, typer.Option("--state-dir", help="As for `ringstone gateway`; default /var/lib/ringstone.")
]
EtcdOption = Annotated[str | None, typer.Option("--etcd", help="As for `ringstone gateway`.")]
PrefixOption = Annotated[str | None, typer.Option("--etcd-prefix", help="As for `ringstone gateway`.")]
HostOption = Annotated[str | None, typer.Option("--host", help="As for `ringstone gateway`.")]


@app.command("export")
def export_(
    file: FileArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    etcd: EtcdOption = None,
    etcd_prefix: PrefixOption = None,
    host: HostOption = None,
) -> None:
    """Write all hosts, pools, volumes and attachments of one moment to FILE, which must not exist. Gateways may run."""
    import json

    from ringstone.errors import NoDeviceError, error_of_os
    from ringstone.state.transfer import export_state

    settings = _config(config, state_dir, etcd, etcd_prefix, host)
    if settings.etcd is None and not settings.database.exists():
        raise NoDeviceError(f"There is no state at {settings.database}; correct --state-dir or --config.")
    store = _open(settings)
    try:
        document = export_state(store)
    finally:
        store.close()
    try:
        # Nobody else's from its first moment on.
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as output:
            output.write(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise error_of_os(error, f"writing {file}", "Choose another file.") from error


@app.command("import")
def import_(
    file: FileArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    etcd: EtcdOption = None,
    etcd_prefix: PrefixOption = None,
    host: HostOption = None,
) -> None:
    """Put an export into a store that is empty, with no gateway running here."""
    from contextlib import ExitStack

    from ringstone.errors import error_of_os
    from ringstone.gateway.daemon import sole_gateway
    from ringstone.state.transfer import import_state

    settings = _config(config, state_dir, etcd, etcd_prefix, host)
    with ExitStack() as stack:
        try:
            text = file.read_text()
            settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise error_of_os(error, f"reading {file}", "Name an export.") from error
        stack.enter_context(sole_gateway(settings.locks[0]))
        store = _open(settings)
        stack.callback(store.close)
        if settings.etcd is None:
            count = import_state(store, text, settings.host, lone=True)
        else:
            from ringstone.state.etcd_transaction import MOST_CHANGES

            # An attachment is two keys.
            count = import_state(store, text, settings.host, lone=False, batch=MOST_CHANGES // 2)
    print(f"Imported {count} records.")


def _config(
    config: Path | None, state_dir: str | None, etcd: str | None, etcd_prefix: str | None, host: str | None
) -> Any:
    from ringstone.gateway.config import load_config

    directory = str(Path(state_dir).absolute()) if state_dir else None
    return load_config(
        config, {"state_dir": directory, "etcd": etcd, "etcd_prefix": etcd_prefix, "host": host}
    )


def _open(config: Any) -> Any:
    from ringstone.state.settings import open_store

    return open_store(config.database, config.host, config.etcd)
