"""`ringstone volume list`, asked of this host's gateway, without the libraries that check options and answers: to
import them takes many times longer than the gateway takes to answer.

What is refused, and whatever goes wrong on the way, is said by the same code as always. An answer that is not as this
release has it is left to the real command, ringstone.cli.volume, which asks again.
"""

import json
from pathlib import Path
from types import NoneType
from typing import Any

from ringstone.cli.quick_list import ListFlags
from ringstone.cli.tables import print_table
from ringstone.peer import GatewayPeer

# What is shown of a volume and of its attachment.
_VOLUME: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "pool": (str,),
    "size": (int,),
    "allocated": (int, NoneType),
    "block_size": (int,),
    "state": (str,),
    "attachment": (dict, NoneType),
}
_ATTACHMENT: dict[str, tuple[type, ...]] = {"state": (str,), "host": (str,)}


def list_volumes(flags: ListFlags) -> bool:
    """Print the table; False, and nothing printed, where the answer is left to the real command."""
    content = GatewayPeer(Path(flags.socket)).ask("GET", "/volumes", query={"pool": flags.pool})
    volumes = _plain(content)
    if volumes is None:
        return False
    from ringstone.cli.volume_table import volume_table

    print_table(volume_table(volumes))
    return True


def _plain(content: bytes) -> list[dict[str, Any]] | None:
    """The volumes in an answer, if they are as expected."""
    try:
        volumes = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(volumes, list) or not all(_holds(volume, _VOLUME) for volume in volumes):
        return None
    attachments = [volume["attachment"] for volume in volumes if volume["attachment"] is not None]
    return volumes if all(_holds(attachment, _ATTACHMENT) for attachment in attachments) else None


def _holds(record: Any, fields: dict[str, tuple[type, ...]]) -> bool:
    """Whether each of `fields` is there, with a value of one of its types."""
    if not isinstance(record, dict):
        return False
    return all(name in record and isinstance(record[name], kinds) for name, kinds in fields.items())
