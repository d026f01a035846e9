"""Gives a Ceph cluster commands, one a line: a process of its own that stays connected, as the `ceph` command takes
a second for each.

Run by the system's Python, which has Debian's librados binding, and not by ours; so it imports nothing of ours.

    /usr/bin/python3 -I ceph_commands.py CONF KEYRING NAME

Each line of its input is a JSON object {"target": "mon" | "mgr" | "osd.N", "command": {"prefix": ...}, "timeout_s": N};
each line of its output {"status": errno or 0, "output": text, "error": text}.
"""

import json
import sys
from typing import Any


def answer(cluster: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the daemons say to one request."""
    command = json.dumps({"format": "json", **request["command"]})
    target = request["target"]
    if target == "mon":
        status, output, error = cluster.mon_command(command, b"", request["timeout_s"])
    elif target == "mgr":
        status, output, error = cluster.mgr_command(command, b"", request["timeout_s"])
    else:
        number = int(target.removeprefix("osd."))
        status, output, error = cluster.osd_command(number, command, b"", request["timeout_s"])
    return {"status": -status, "output": output.decode(errors="replace"), "error": error}


def main() -> None:
    """Until the input ends."""
    import rados  # type: ignore[import-not-found]

    conf, keyring, name = sys.argv[1:]
    cluster = rados.Rados(conffile=conf, name=name, conf={"keyring": keyring})
    connected = False
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if not connected:
                cluster.connect(timeout=request["timeout_s"])
                connected = True
            said = answer(cluster, request)
        except rados.Error as error:
            said = {"status": getattr(error, "errno", None) or 5, "output": "", "error": str(error)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
