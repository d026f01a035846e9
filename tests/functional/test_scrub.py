"""A block of a store rots. A scrub finds it while guests write, a check when the store is closed, and neither finds
more. What can be mended without loss is."""

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ringstone.bench.process import run_job
from ringstone.pools.store_format import decode_page, decode_superblock
from tests.framework.gateway import GatewayProcess
from tests.framework.load import script, verify

MIB = 1 << 20
BLOCK = 4096
SUPERBLOCKS = (0, 512 << 10)
# The block that rots, counted among those that are no zeroes.
ROTTEN = 700
_PLACE = re.compile(
    r"the block at byte (\d+) of (.*), byte (\d+) of the drive, is not what was written there"
)


@pytest.fixture
def drive(gateway: GatewayProcess) -> Path:
    """Of pool `fast`, with 8 MiB of volume `cold`, which has checksums, and a snapshot of it."""
    path = gateway.root / "drive"
    gateway.cli("pool", "create", "fast", "--type", "store", "--path", str(path), "--size", "128M")
    gateway.cli("volume", "create", "cold", "--pool", "fast", "--size", "16M", "--integrity")
    socket = gateway.cli_json("volume", "attach", "cold")["socket"]
    writes = [
        {"op": "write", "offset": at, "len": MIB, "fill": {"seed": at}} for at in range(0, 8 * MIB, MIB)
    ]
    script(socket, [*writes, {"op": "flush"}])
    return path


def block(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), BLOCK, at)


def rot(path: Path, at: int) -> None:
    """A bit is another one than was written."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 16]), at)
        os.fsync(file.fileno())


def superblocks(path: Path) -> tuple[int, int]:
    """Places: of the older one, of the newer one."""
    older, newer = sorted(SUPERBLOCKS, key=lambda at: decode_superblock(block(path, at)).generation)
    return older, newer


def some_block(path: Path) -> int:
    """The place of a block that the volume has written."""
    zone = decode_superblock(block(path, superblocks(path)[1])).zones[0]
    written = (at for at in range(zone.data, path.stat().st_size, BLOCK) if any(block(path, at)))
    return next(at for n, at in enumerate(written) if n == ROTTEN)


@contextmanager
def writing(socket: str) -> Iterator[list[bool]]:
    """A client writes, discards and reads all the time."""
    stop, passed = threading.Event(), list[bool]()

    def run() -> None:
        while not stop.is_set():
            passed.append(verify(socket, queues=2, operations=3_000)["passed"])

    client = threading.Thread(target=run)
    client.start()
    try:
        yield passed
    finally:
        stop.set()
        client.join()


def scrubbed(gateway: GatewayProcess) -> tuple[int, dict[str, Any]]:
    done = gateway.cli("store", "scrub", "fast", "--rate", "4G", "--wait", "--json", check=False)
    return done.returncode, json.loads(done.stdout)["scrub"]


def test_a_rotten_block_is_found_and_no_other(gateway: GatewayProcess, drive: Path) -> None:
    at = some_block(drive)
    gateway.cli("volume", "create", "hot", "--pool", "fast", "--size", "24M", "--integrity")
    socket = gateway.cli_json("volume", "attach", "hot", "--queues", "2")["socket"]
    with writing(socket) as passed:
        for _ in range(5):
            code, clean = scrubbed(gateway)
            assert (code, clean["state"], clean["faults"]) == (0, "done", [])
            assert clean["verified"] >= 8 * MIB // BLOCK
        gateway.cli("snapshot", "create", "cold", "monday", "--also", "hot")
        rot(drive, at + 99)
        for _ in range(3):
            code, found = scrubbed(gateway)
            assert (code, found["state"], found["bad"], found["unreadable"], found["mended"]) == (
                11,
                "done",
                1,
                0,
                0,
            )
    assert passed
    assert all(passed)
    place = _PLACE.match(found["faults"][0])
    assert place is not None, found["faults"]
    assert (place[2], int(place[3])) == ('snapshot "monday" of volume "cold"', at)
    events = gateway.cli_json("status", "--events", "50")["events"]
    assert any(place[0] in one["message"] for one in events)
    gateway.kill()
    checked = gateway.cli("store", "check", str(drive), "--json", check=False)
    assert checked.returncode == 11, checked.stderr
    report = json.loads(checked.stdout)
    assert (report["faults"], report["blocks"]["bad"]) == ([place[0]], 1)
    assert gateway.cli_json("store", "check", str(drive), "--quick")["blocks"] is None
    refused = gateway.cli("store", "check", str(drive), "--repair", "--yes", check=False)
    assert refused.returncode == 11
    assert "Nothing was written, as there are faults that cannot be mended." in refused.stdout
    gateway.start()
    assert gateway.cli_json("pool", "show", "fast")["scrub"] is None
    socket = gateway.cli_json("volume", "show", "cold")["attachment"]["socket"]
    reads = [{"op": "read", "offset": offset, "len": BLOCK} for offset in range(0, 8 * MIB, BLOCK)]
    results = run_job("load", {"mode": "script", "socket": socket, "operations": reads})["results"]
    assert [n for n, one in enumerate(results) if one["status"] == "ioerr"] == [int(place[1]) // BLOCK]


def test_a_scrub_is_cancelled_and_gets_another_rate(gateway: GatewayProcess, drive: Path) -> None:
    begun = gateway.cli_json("store", "scrub", "fast", "--rate", "64K")["scrub"]
    assert (begun["state"], begun["rate"], begun["total"]) == ("running", 64 << 10, 8 * MIB)
    assert "running: " in gateway.cli("pool", "show", "fast").stdout
    assert gateway.cli_json("store", "scrub", "fast", "--rate", "128K")["scrub"]["rate"] == 128 << 10
    gateway.cli("store", "scrub", "fast", "--cancel")
    gateway.wait_for(
        "the end of the scrub",
        lambda client: (scrub := client.pool("fast").scrub) is not None and scrub.state == "cancelled",
    )


def test_bad_copies_are_mended_where_nothing_is_lost(gateway: GatewayProcess, drive: Path) -> None:
    socket = gateway.cli_json("volume", "show", "cold")["attachment"]["socket"]
    read = {"op": "read", "offset": 0, "len": MIB}
    before = script(socket, [read])[0]["crc32"]
    gateway.stop()
    nothing = gateway.cli("store", "check", str(drive), "--repair", "--yes")
    assert nothing.stdout.endswith("There is nothing to mend.\n")
    older, newer = superblocks(drive)
    kept = block(drive, newer)
    rot(drive, older + 2000)
    found = gateway.cli_json("store", "check", str(drive))
    assert (len(found["mendable"]), found["faults"]) == (1, [])
    asked = gateway.cli("store", "check", str(drive), "--repair", check=False)
    assert asked.returncode == 1
    assert "Write these copies anew?" in asked.stderr
    mended = gateway.cli("store", "check", str(drive), "--repair", "--yes")
    assert f"mendable: the superblock at byte {older} is bad" in mended.stdout
    assert mended.stdout.endswith("1 copies were written anew.\n")
    assert superblocks(drive) == (older, newer)
    assert block(drive, newer) == kept
    assert gateway.cli_json("store", "check", str(drive))["mendable"] == []
    gateway.start()
    socket = gateway.cli_json("volume", "show", "cold")["attachment"]["socket"]
    assert script(socket, [read])[0]["crc32"] == before


def test_a_page_whose_newer_copy_is_bad_is_refused(gateway: GatewayProcess, drive: Path) -> None:
    """An older copy of the table would have volumes hold what they held long ago."""
    gateway.stop()
    # Opened and closed: each writes the table's first page to the other copy.
    gateway.start()
    gateway.cli("volume", "create", "more", "--pool", "fast", "--size", "4M")
    gateway.cli("volume", "clone", "cold", "copy")
    script(
        gateway.cli_json("volume", "attach", "more")["socket"],
        [{"op": "write", "offset": 0, "len": MIB, "fill": {"seed": 5}}, {"op": "flush"}],
    )
    gateway.stop()
    superblock = decode_superblock(block(drive, superblocks(drive)[1]))
    pages = -(-(superblock.zones[0].extents + superblock.zones[0].tombs) // 252)
    copies = (superblock.zones[0].table, superblock.zones[0].table + pages * BLOCK)
    newer = max(copies, key=lambda at: decode_page(block(drive, at)).generation)
    rot(drive, newer + 2000)
    before = drive.read_bytes()
    refused = gateway.cli("store", "check", str(drive), "--repair", "--yes", check=False)
    assert refused.returncode == 10, refused.stderr
    assert f"the newer copy of page 0 of the table is bad at byte {newer}" in refused.stderr
    assert drive.read_bytes() == before
