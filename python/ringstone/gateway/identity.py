"""Which machine this is, whatever it is called: two machines of one name are told apart by it."""

import os
import time
import uuid
from pathlib import Path

from ringstone.errors import StateError, error_of_os
from ringstone.gateway.config import GatewayConfig
from ringstone.state import HostRecord
from ringstone.version import version


def host_id(state_dir: Path) -> str:
    """The UUID in the file host-id, made when there is none yet."""
    path = state_dir / "host-id"
    try:
        if not path.exists():
            # Complete or not there, whenever the machine loses its power.
            new = state_dir / f"host-id.{os.getpid()}"
            with new.open("w") as file:
                file.write(f"{uuid.uuid4()}\n")
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
        text = path.read_text().strip()
    except OSError as error:
        raise error_of_os(error, f"keeping {path}", "Check the state directory.") from error
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise StateError(
            f"{path} is no UUID. Put back the one that `ringstone host show` has as this host's id; or stop the "
            "gateway, remove the file, and remove the host from the cluster."
        ) from error


def this_host(config: GatewayConfig, usable_cores: int) -> HostRecord:
    """As it is announced, but for what changes. `usable_cores`: how many this process may use."""
    now = time.time_ns()
    return HostRecord(
        name=config.host,
        id=host_id(config.state_dir),
        addresses=(config.listening.url,) if config.listening else (),
        version=version(),
        cores=config.cores,
        free_cores=max(0, usable_cores - len(config.cores)),
        seen_ns=now,
        created_ns=now,
    )
