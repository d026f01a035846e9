"""Store pools as an operator has them: on a device or file, grown, filled, checked, and on the wrong drive."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringstone.bench.process import run_job
from ringstone.pools.store_format import decode_superblock
from tests.framework.devices import loop_device
from tests.framework.gateway import GatewayProcess
from tests.framework.load import script, verify

MIB = 1 << 20
_RECLAIM_SECONDS = 60


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """Of 64 MiB, with a filesystem on it."""
    backing = tmp_path / "device.img"
    backing.touch()
    os.truncate(backing, 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(backing)], check=True, capture_output=True)
    with loop_device(backing, 64 * MIB) as path:
        yield path


def write(socket: str, offset: int, length: int, seed: int = 1) -> int:
    """The checksum of what is read then."""
    steps = [
        {"op": "write", "offset": at, "len": MIB, "fill": {"seed": seed}} for at in at_each(offset, length)
    ]
    return int(
        script(socket, [*steps, {"op": "flush"}, {"op": "read", "offset": offset, "len": MIB}])[-1]["crc32"]
    )


def read(socket: str, offset: int = 0) -> int:
    return int(script(socket, [{"op": "read", "offset": offset, "len": MIB}])[-1]["crc32"])


def at_each(offset: int, length: int) -> range:
    return range(offset, offset + length, MIB)


def space(gateway: GatewayProcess, pool: str = "fast") -> dict[str, Any]:
    found: dict[str, Any] = gateway.cli_json("pool", "show", pool)["space"]
    return found


def wait_reclaimed(gateway: GatewayProcess, used: int) -> None:
    """Until no more than that is used; there is no event to wait for."""
    end = time.monotonic() + _RECLAIM_SECONDS
    while (found := space(gateway))["used"] > used or found["reclaiming"]:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_a_device_becomes_a_store_and_is_free_again(device: Path) -> None:
    with GatewayProcess() as gateway:
        gateway.start()
        make = ("pool", "create", "fast", "--type", "store", "--path", str(device))
        refused = gateway.cli(*make, check=False)
        assert refused.returncode == 4
        assert "it holds ext4" in refused.stderr
        assert "--yes" in refused.stderr
        gateway.cli(*make, "--yes", "--extent", "16K")
        gateway.cli("volume", "create", "v", "--pool", "fast", "--size", "200M")
        attached = gateway.cli_json("volume", "attach", "v")
        content = write(attached["socket"], 0, 2 * MIB)
        again = gateway.cli(
            "pool", "create", "other", "--type", "store", "--path", str(device), "--yes", check=False
        )
        assert again.returncode == 4
        assert "already belongs to pool 'fast'" in again.stderr
        plain = gateway.cli(
            "pool", "create", "other", "--type", "file", "--path", str(device), "--yes", check=False
        )
        assert plain.returncode == 4
        gateway.restart()
        assert read(gateway.cli_json("volume", "show", "v")["attachment"]["socket"]) == content
        gateway.cli("volume", "detach", "v")
        gateway.cli("volume", "delete", "v")
        gateway.cli("pool", "delete", "fast")
        gateway.cli(*make, "--yes")


def test_what_another_gateway_has_is_not_taken(device: Path) -> None:
    with GatewayProcess() as gateway, GatewayProcess() as other:
        gateway.start()
        other.start()
        make = ("pool", "create", "fast", "--type", "store", "--path", str(device), "--yes")
        gateway.cli(*make)
        gateway.cli("volume", "create", "v", "--pool", "fast", "--size", "8M")
        refused = other.cli(*make, check=False)
        assert refused.returncode == 4, refused.stderr
        assert other.cli_json("pool", "list") == []
        assert verify(gateway.cli_json("volume", "attach", "v")["socket"], operations=300)["passed"]


def test_a_device_and_a_file_grow_under_load(tmp_path: Path, gateway: GatewayProcess) -> None:
    backing = tmp_path / "device.img"
    with loop_device(backing, 64 * MIB) as device:
        drive = gateway.root / "drive"
        gateway.cli("pool", "create", "fast", "--type", "store", "--path", str(device))
        gateway.cli("pool", "create", "small", "--type", "store", "--path", str(drive), "--size", "64M")
        for pool in ("fast", "small"):
            before = space(gateway, pool)["capacity"]
            nothing = gateway.cli("pool", "grow", pool, check=False)
            assert nothing.returncode == 5, nothing.stderr
            gateway.cli("volume", "create", f"of-{pool}", "--pool", pool, "--size", "96M")
            socket = gateway.cli_json("volume", "attach", f"of-{pool}")["socket"]
            content = write(socket, 0, 16 * MIB)
            if pool == "fast":
                os.truncate(backing, 128 * MIB)
                subprocess.run(["losetup", "--set-capacity", str(device)], check=True)
                gateway.cli("pool", "grow", pool)
            else:
                gateway.cli("pool", "grow", pool, "--size", "128M")
            assert space(gateway, pool)["capacity"] - before > 60 * MIB
            # More than had room before.
            write(socket, 16 * MIB, 64 * MIB, seed=2)
            assert read(socket) == content
        gateway.restart()
        for pool in ("fast", "small"):
            assert read(gateway.cli_json("volume", "show", f"of-{pool}")["attachment"]["socket"]) == content
            gateway.cli("volume", "detach", f"of-{pool}")
            gateway.cli("volume", "delete", f"of-{pool}")
            gateway.cli("pool", "delete", pool)
        assert not drive.exists()


def test_room_is_counted_warned_of_and_given_back(gateway: GatewayProcess) -> None:
    gateway.cli("pool", "create", "fast", "--type", "store", "--size", "64M")
    capacity = space(gateway)["capacity"]
    assert space(gateway)["used"] == 0
    gateway.cli("volume", "create", "v", "--pool", "fast", "--size", "128M")
    socket = gateway.cli_json("volume", "attach", "v")["socket"]
    filled = 9 * capacity // 10 // MIB * MIB
    write(socket, 0, filled)
    assert space(gateway)["used"] == filled
    assert gateway.cli_json("volume", "show", "v")["allocated"] == filled
    space(gateway)
    events = [one["message"] for one in gateway.cli_json("status", "--events", "50")["events"]]
    assert len([one for one in events if one.startswith("Pool fast is 8")]) == 1
    script(socket, [{"op": "discard", "offset": 0, "len": MIB}, {"op": "flush"}])
    wait_reclaimed(gateway, filled - MIB)
    gateway.cli("snapshot", "create", "v", "monday")
    write(socket, MIB, MIB, seed=2)
    assert space(gateway)["used"] == filled
    assert gateway.cli_json("volume", "show", "v")["allocated"] == MIB
    assert gateway.cli_json("snapshot", "list", "v")[0]["own"] == filled - MIB
    gateway.cli("snapshot", "delete", "v", "monday")
    wait_reclaimed(gateway, filled - MIB)
    gateway.cli("volume", "detach", "v")
    gateway.cli("volume", "delete", "v")
    wait_reclaimed(gateway, 0)


def test_a_snapshot_frees_what_is_told_and_its_deletion_ends(gateway: GatewayProcess) -> None:
    drive = gateway.root / "drive"
    gateway.cli("pool", "create", "fast", "--type", "store", "--path", str(drive), "--size", "192M")
    gateway.cli("volume", "create", "v", "--pool", "fast", "--size", "64M")
    socket = gateway.cli_json("volume", "attach", "v")["socket"]
    write(socket, 0, 32 * MIB)
    gateway.cli("snapshot", "create", "v", "monday")
    write(socket, 0, 24 * MIB)
    gateway.cli("snapshot", "create", "v", "tuesday")
    told = {one["snapshot"]: one["size"] for one in gateway.cli_json("snapshot", "reclaimable", "v")}
    assert told == {"monday": 24 * MIB, "tuesday": 0}
    used = space(gateway)["used"]
    gateway.cli("snapshot", "delete", "v", "monday")
    wait_reclaimed(gateway, used - 24 * MIB)
    assert gateway.cli_json("snapshot", "deletions", "v") == []
    assert space(gateway)["used"] == used - 24 * MIB
    late = gateway.cli("snapshot", "keep", "v", "monday", check=False)
    assert late.returncode == 3, late.stderr
    assert "no snapshot" in late.stderr


def test_a_store_is_checked_when_no_gateway_has_it(gateway: GatewayProcess) -> None:
    drive = gateway.root / "drive"
    gateway.cli("pool", "create", "fast", "--type", "store", "--path", str(drive), "--size", "64M")
    assert drive.stat().st_mode & 0o777 == 0o600
    gateway.cli("volume", "create", "v", "--pool", "fast", "--size", "32M")
    assert verify(gateway.cli_json("volume", "attach", "v")["socket"], operations=500)["passed"]
    gateway.cli("snapshot", "create", "v", "monday")
    held = gateway.cli("store", "check", str(drive), check=False)
    assert held.returncode == 4, held.stdout + held.stderr
    gateway.kill()
    found = gateway.cli_json("store", "check", str(drive))
    assert found["faults"] == []
    assert [(one["name"], [two["name"] for two in one["snapshots"]]) for one in found["volumes"]] == [
        ("v", ["monday"])
    ]
    nothing = gateway.cli("store", "check", "/dev/ringstone-missing", check=False)
    assert nothing.returncode == 8, nothing.stderr
    plain = gateway.root / "plain"
    plain.write_bytes(bytes(MIB))
    no_store = gateway.cli("store", "check", str(plain), check=False)
    assert no_store.returncode != 0
    assert "no store" in no_store.stderr


def rot(drive: Path) -> None:
    """Change a byte of each block of data."""
    with drive.open("r+b") as file:
        newest = max(
            (decode_superblock(read_at(file.fileno(), at)) for at in (0, 512 << 10)),
            key=lambda one: one.generation,
        )
        for at in range(newest.zones[0].data, drive.stat().st_size, 4096):
            block = read_at(file.fileno(), at)
            if any(block):
                os.pwrite(file.fileno(), bytes([block[9] ^ 1]), at + 9)
        os.fsync(file.fileno())


def read_at(descriptor: int, at: int) -> bytes:
    return os.pread(descriptor, 4096, at)


def test_blocks_have_checksums_where_that_is_asked(gateway: GatewayProcess) -> None:
    drive = gateway.root / "drive"
    gateway.cli("pool", "create", "fast", "--type", "store", "--path", str(drive), "--size", "128M")
    gateway.make_pool("memory", "plain")
    refused = gateway.cli(
        "volume", "create", "v", "--pool", "plain", "--size", "32M", "--integrity", check=False
    )
    assert refused.returncode == 5, refused.stderr
    assert "keeps no checksums" in refused.stderr
    gateway.cli("volume", "create", "v", "--pool", "fast", "--size", "32M", "--integrity")
    socket = gateway.cli_json("volume", "attach", "v", "--queues", "2")["socket"]
    assert verify(socket, queues=2)["passed"]
    gateway.cli("snapshot", "create", "v", "monday")
    content = write(socket, 0, 8 * MIB, seed=3)
    gateway.kill()
    gateway.start()
    socket = gateway.cli_json("volume", "show", "v")["attachment"]["socket"]
    assert read(socket) == content
    assert verify(socket, queues=2)["passed"]
    gateway.cli("snapshot", "clone", "v", "monday", "copy")
    assert [gateway.cli_json("volume", "show", one)["integrity"] for one in ("v", "copy")] == [True, True]
    rot(drive)
    [result] = run_job(
        "load", {"mode": "script", "socket": socket, "operations": [{"op": "read", "offset": 0, "len": 4096}]}
    )["results"]
    assert result["status"] == "ioerr"
    messages = [one["message"] for one in gateway.cli_json("status", "--events", "50")["events"]]
    assert [one for one in messages if "is not what was written there" in one]


def key_at(path: Path) -> Path:
    path.write_text(os.urandom(32).hex() + "\n")
    path.chmod(0o600)
    return path


def secret_of(path: Path) -> bytes:
    return bytes.fromhex(path.read_text())


def test_blocks_are_encrypted_where_that_is_asked(gateway: GatewayProcess, tmp_path: Path) -> None:
    """Neither keys nor what a guest wrote are anywhere but with the operator."""
    drive = gateway.root / "drive"
    key, other, third = (key_at(tmp_path / name) for name in ("key", "other", "third"))
    secrets = [secret_of(path) for path in (key, other, third)]
    plain = bytes([0x5A]) * 64
    make = ("--type", "store", "--path", str(drive), "--size", "128M")
    gateway.cli("pool", "create", "safe", *make, "--key-file", str(key))
    gateway.cli("volume", "create", "v", "--pool", "safe", "--size", "32M", "--encryption")
    socket = gateway.cli_json("volume", "attach", "v", "--queues", "2")["socket"]
    assert verify(socket, queues=2)["passed"]
    gateway.cli("snapshot", "create", "v", "monday")
    content = write(socket, 0, 8 * MIB, seed=3)
    # The key goes over with the rest: nobody asks for it at an upgrade.
    key.rename(tmp_path / "kept")
    gateway.upgrade()
    assert read(socket) == content
    assert verify(socket, queues=2)["passed"]
    content = write(socket, 0, 8 * MIB, seed=4)
    gateway.kill()
    gateway.start()
    shown = gateway.cli_json("volume", "show", "v")
    assert "Reading the key" in shown["attachment"]["reason"], shown
    (tmp_path / "kept").rename(key)
    gateway.cli("volume", "attach", "v", "--queues", "2")
    assert read(socket) == content
    for length in (MIB, 512):
        script(socket, [{"op": "write", "offset": 16 * MIB, "len": length, "fill": {"byte": plain[0]}}] * 2)
    script(socket, [{"op": "flush"}])
    gateway.cli("pool", "rekey", "safe", "--key-file", str(other))
    key.unlink()
    gateway.cli("snapshot", "clone", "v", "monday", "copy")
    gateway.restart()
    assert read(socket) == content
    gateway.cli("volume", "detach", "v")
    swap(other, third)
    refused = gateway.cli("volume", "attach", "v", check=False)
    assert refused.returncode == 14, refused.stderr
    assert "another key than the pool has" in refused.stderr
    swap(other, third)
    assert [gateway.cli_json("volume", "show", one)["encryption"] for one in ("v", "copy")] == [True, True]
    assert read(gateway.cli_json("volume", "attach", "v")["socket"]) == content
    written = [path for path in gateway.root.rglob("*") if path.is_file()]
    assert drive in written
    for path in written:
        found = path.read_bytes()
        for hidden in (plain, *secrets, *(secret.hex().encode() for secret in secrets)):
            assert hidden not in found, path


def test_the_wrong_drive_is_not_served(gateway: GatewayProcess) -> None:
    """As after a boot that names devices in another order."""
    drives = {name: gateway.root / f"{name}.drive" for name in ("a", "b")}
    sums = {}
    for seed, (name, drive) in enumerate(drives.items()):
        gateway.cli("pool", "create", name, "--type", "store", "--path", str(drive), "--size", "32M")
        gateway.cli("volume", "create", f"of-{name}", "--pool", name, "--size", "8M")
        sums[name] = write(gateway.cli_json("volume", "attach", f"of-{name}")["socket"], 0, MIB, seed)
    gateway.stop()
    swap(*drives.values())
    gateway.start()
    for name, drive in drives.items():
        shown = gateway.cli_json("pool", "show", name)
        assert shown["state"] == "failed"
        assert f"is not that of pool '{name}'" in shown["reason"]
        assert gateway.cli_json("volume", "show", f"of-{name}")["attachment"]["state"] == "failed"
        assert drive.exists()
    gateway.stop()
    swap(*drives.values())
    gateway.start()
    for name, content in sums.items():
        assert read(gateway.cli_json("volume", "show", f"of-{name}")["attachment"]["socket"]) == content


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
