"""The power goes under a store, at each moment of its life in a guest: what was flushed is there, each sector written
since is old or new, snapshots are whole or not there, and the check has nothing to say.

A guest with Debian has the store on a device whose requests its kernel writes down (dm-log-writes), and the host makes
of that what the drive would be after a loss of power.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import pytest

import tests.framework as framework
from ringstone import _engine
from ringstone.hypervisor.debian_root import disk_args, make_image
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.guest_image import ensure_guest_image
from ringstone.hypervisor.guest_kernel import Kernel, module_dependencies, read_module
from tests.framework.chance import chance as chance
from tests.framework.installed import booted
from tests.framework.power_plan import SIZE, Plan
from tests.framework.scripts import SECTOR, read
from tests.framework.write_log import Flag, WriteLog

pytestmark = pytest.mark.guest

MIB = 1 << 20
DRIVE = 16 * MIB
# What is written down: some hundred KiB a round, and the store as it is made.
LOG = 1024 * MIB
BLOCK = 4096
DISKS = ("drive", "log", "tools")
MODULE = "dm_log_writes"
WORK = Path(framework.__file__).with_name("power_guest.py")
GUEST_SECONDS = 900.0


def modules(tree: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """The kernel's module and what it needs, in the order in which they are loaded."""
    kernel = Kernel.find(tree)
    files, seen = kernel.module_files(), kernel.built_in()

    def needed(name: str) -> Iterator[tuple[str, bytes]]:
        if name not in seen:
            seen.add(name)
            module = read_module(files[name])
            for dependency in module_dependencies(module):
                yield from needed(dependency)
            yield name, module

    yield from needed(wanted)


def tools(folder: Path, plan: Plan) -> list[str]:
    """A folder with what the guest needs, and the names of its modules."""
    folder.mkdir()
    kernel = ensure_guest_image().kernel
    tree = next(
        parent for parent in kernel.parents if (parent / "lib").is_dir() or (parent / "usr/lib").is_dir()
    )
    order = []
    for name, module in modules(tree, MODULE):
        (folder / f"{name}.ko").write_bytes(module)
        order.append(name)
    # The engine in a package of its name, without all else that is in that.
    package = folder / "ringstone"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy2(str(_engine.__file__), package / "_engine.abi3.so")
    shutil.copy2(WORK, folder / WORK.name)
    # The guest's Debian has no kmod. This one needs no libraries.
    busybox = shutil.which("busybox")
    assert busybox is not None, "busybox-static is among the packages of make setup"
    shutil.copy2(busybox, folder / "busybox")
    (folder / "plan.json").write_text(json.dumps(plan.of_guest()))
    return order


def disk(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def live(guest: Guest, order: list[str]) -> None:
    """The store's life, in the guest."""

    def shell(command: str) -> None:
        guest.run(command, timeout_s=GUEST_SECONDS, check=True)

    place = {name: f"/dev/disk/by-id/virtio-{name}" for name in DISKS}
    shell(f"mkdir /run/tools && mount -o ro {place['tools']} /run/tools")
    for name in order:
        shell(f"/run/tools/busybox insmod /run/tools/{name}.ko")
    table = f"0 {DRIVE // 512} log-writes {place['drive']} {place['log']}"
    shell(f"dmsetup create logged --table '{table}'")
    shell("python3 /run/tools/power_guest.py /run/tools/plan.json")
    # The kernel writes down how many entries there are.
    shell("dmsetup remove logged && sync")


def lived(folder: Path, plan: Plan) -> WriteLog:
    """What was written down of the life that `plan` has."""
    order = tools(folder / "tools-of-guest", plan)
    images = {name: disk(folder, name, size) for name, size in (("drive", DRIVE), ("log", LOG))}
    images["tools"] = folder / "tools"
    make_image(folder / "tools-of-guest", images["tools"], 64 * MIB)
    devices = [argument for name in DISKS for argument in disk_args(images[name], name)]
    with booted("bookworm", folder / "guest", devices) as guest:
        live(guest, order)
    return WriteLog(images["log"])


class Host:
    """Where stores are looked at after a loss of power."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engine = _engine.Engine([max(os.sched_getaffinity(0))], stats_path=str(folder / "stats"))

    def close(self) -> None:
        self._engine.stop()

    def look(self, drive: Path, plan: Plan, durable: int) -> None:
        """All of what must hold when rounds up to `durable` were flushed."""
        report = json.loads(_engine.Store.check(str(drive)))
        assert report["faults"] == []
        with closing(_engine.Store(str(drive))) as store:
            names = {(one["name"], two["name"]) for one in report["volumes"] for two in one["snapshots"]}
            assert {one["name"] for one in report["volumes"]} == set(plan.contents)
            for volume in plan.contents:
                wrong = self._wrong(drive, volume, *plan.states(volume, durable))
                assert wrong is None, f"volume {volume} is wrong at byte {wrong}"
            for (volume, name), life in plan.snapshots.items():
                there = (volume, name) in names
                assert there or not life.must_be(durable), f"snapshot {volume}@{name} is lost"
                assert not there or life.may_be(durable), f"snapshot {volume}@{name} is back"
                if there:
                    store.call(
                        json.dumps({"op": "clone", "volume": volume, "snapshot": name, "name": "clone"})
                    )
                    wrong = self._wrong(drive, "clone", life.content)
                    assert wrong is None, f"snapshot {volume}@{name} is wrong at byte {wrong}"
                    store.call(json.dumps({"op": "delete", "name": "clone"}))

    def _wrong(self, drive: Path, volume: str, *states: bytes) -> int | None:
        """The first byte of the volume at which a sector is as in none of the `states`."""
        socket = str(self._folder / "socket")
        with self._attached(drive, volume, socket):
            places = range(0, SIZE, BLOCK)
            found = self._ask(socket, [{"op": "read", "offset": at, "len": BLOCK} for at in places])
            # A block that is as in no state may yet have sectors of several.
            mixed = [
                at
                for at, one in zip(places, found, strict=True)
                if one["crc32"] not in [crc32(state[at : at + BLOCK]) for state in states]
            ]
            blocks = self._ask(socket, [read(at, BLOCK) for at in mixed]) if mixed else []
        for at, one in zip(mixed, blocks, strict=True):
            block = bytes.fromhex(one["text"])
            for within in range(0, BLOCK, SECTOR):
                sector = slice(at + within, at + within + SECTOR)
                if block[within : within + SECTOR] not in [state[sector] for state in states]:
                    return at + within
        return None

    def _ask(self, socket: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        job = {"mode": "script", "socket": socket, "operations": requests, "depth": 8}
        results: list[dict[str, Any]] = json.loads(_engine.load(json.dumps(job)))["results"]
        assert [one["status"] for one in results] == ["ok"] * len(requests)
        return results

    @contextmanager
    def _attached(self, drive: Path, volume: str, socket: str) -> Iterator[None]:
        backend = {"type": "store", "path": str(drive), "volume": volume}
        self._engine.open_volume(volume, json.dumps(backend), size=SIZE)
        self._engine.attach(volume, socket)
        yield
        self._engine.detach(volume, force=True)
        self._engine.close_volume(volume)


# Where power goes: behind this many entries, with these later ones done too, of the last of them only so many sectors.
Moment = tuple[int, list[int], int | None]


def moments(log: WriteLog, chance: Random) -> list[Moment]:
    """Behind each entry from the first mark on, with the next one torn, and with some of the writes of each flush."""
    first = next(place for place, entry in enumerate(log.entries) if entry.mark == "begin")
    found: list[Moment] = [(place, [], None) for place in range(first + 1, len(log.entries) + 1)]
    for place in range(first + 1, len(log.entries)):
        if log.entries[place].length > 512:
            found.append((place, [place], chance.randrange(1, log.entries[place].length // 512)))
    for group in log.groups():
        if group.start > first:
            for _ in range(2):
                some = [place for place in group if chance.random() < 0.5]
                found.append((group.start, some, None))
    return found


def lose_power(folder: Path, log: WriteLog, plan: Plan, chosen: list[Moment]) -> None:
    state, copy = disk(folder, "state", DRIVE), folder / "copy"
    done = 0
    with closing(Host(folder)) as host:
        for until, more, sectors in sorted(chosen, key=lambda moment: moment[0]):
            log.replay(state, range(done, until))
            done = until
            shutil.copyfile(state, copy)
            log.replay(copy, more[:-1])
            log.replay(copy, more[-1:], sectors=sectors)
            marks = [entry.mark for entry in log.entries[:until] if entry.mark is not None]
            durable = -1 if marks[-1] == "begin" else int(marks[-1])
            try:
                host.look(copy, plan, durable)
            except (AssertionError, _engine.EngineError) as error:
                where = f"behind entry {until} with {more}, of the last {sectors} sectors; round {durable} was flushed"
                raise AssertionError(f"{where}: {error}") from error


def notices_what_was_forgotten(folder: Path, log: WriteLog, plan: Plan) -> None:
    """Or all of that would pass on a store that does not flush: here the last round's flushes made nothing durable."""
    marks = [place for place, entry in enumerate(log.entries) if entry.mark is not None]
    kept = [place for place, entry in enumerate(log.entries) if place < marks[-2] or not entry.waits]
    drive = disk(folder, "forgetful", DRIVE)
    log.replay(drive, kept)
    with closing(Host(folder)) as host, pytest.raises((AssertionError, _engine.EngineError)):
        host.look(drive, plan, len(plan.rounds) - 1)


@pytest.mark.parametrize(
    ("rounds", "most"), [(12, 50), pytest.param(150, 5_000, id="long", marks=pytest.mark.soak)]
)
def test_what_was_flushed_outlives_the_power(tmp_path: Path, chance: Random, rounds: int, most: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("Making a Debian root file system takes root.")
    plan = Plan.make(chance, rounds)
    log = lived(tmp_path, plan)
    found = moments(log, chance)
    flushes = sum(bool(entry.flags & (Flag.FLUSH | Flag.FUA)) for entry in log.entries)
    print(f"{len(log.entries)} entries, {flushes} flushes, {len(found)} moments")
    assert flushes > rounds
    lose_power(tmp_path, log, plan, chance.sample(found, min(most, len(found))))
    notices_what_was_forgotten(tmp_path, log, plan)
