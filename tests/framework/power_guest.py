"""A store's life on a drive whose writes are written down, in a guest: `python3 power_guest.py PLAN`, where PLAN is the
file that tests.framework.power_plan has made. It needs the engine and Python's own modules, no more.

Each round's requests are made, then a flush is answered, and then the log has a mark with the round's number.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ringstone import _engine

DRIVE = "/dev/mapper/logged"
CORE = 0
EXTENT = 16384


def main(path: str) -> None:
    plan: dict[str, Any] = json.loads(Path(path).read_text())
    engine = _engine.Engine([CORE], stats_path="/run/stats")
    _engine.Store.format(DRIVE, extent=EXTENT)
    store = _engine.Store(DRIVE)
    sockets = {}
    for name, volume in plan["volumes"].items():
        store.call(json.dumps({"op": "create", "name": name, **volume}))
        backend = {"type": "store", "path": DRIVE, "volume": name}
        engine.open_volume(name, json.dumps(backend), size=volume["size"])
        sockets[name] = f"/run/{name}.sock"
        engine.attach(name, sockets[name])
        ask(sockets[name], [{"op": "flush"}], depth=1)
    mark("begin")
    for number, of_round in enumerate(plan["rounds"]):
        for command in of_round["commands"]:
            store.call(json.dumps(command))
        for name, requests in of_round["requests"].items():
            ask(sockets[name], requests, depth=8)
            ask(sockets[name], [{"op": "flush"}], depth=1)
        mark(str(number))
    engine.stop()


def ask(socket: str, requests: list[dict[str, Any]], *, depth: int) -> None:
    job = {"mode": "script", "socket": socket, "operations": requests, "depth": depth, "timeout_seconds": 60}
    results = json.loads(_engine.load(json.dumps(job)))["results"]
    wrong = [one for one in results if one["status"] != "ok"]
    assert not wrong, wrong
    assert len(results) == len(requests)


def mark(text: str) -> None:
    subprocess.run(["dmsetup", "message", DRIVE, "0", "mark", text], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
