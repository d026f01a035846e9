"""Every operation of more than one step, with the gateway killed before and behind each of them: after the next start
the operation is done or undone, nothing is half made, and it can be repeated. Store and pools are real, in Ceph too."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ringstone import _engine
from ringstone.errors import ExistsError, InvalidError, NotFoundError
from ringstone.gateway.snapshots import Snapshots
from ringstone.gateway.undo import UndoLater
from ringstone.lab.ceph import CephCluster
from ringstone.pools import open_pool
from ringstone.pools.device import DevicePool
from ringstone.pools.file import FilePool
from ringstone.pools.memory import MemoryPool
from ringstone.pools.rbd import RbdPool
from ringstone.pools.store import StorePool
from ringstone.state import PoolRecord, SqliteStore, VolumeState
from tests.framework.devices import loop_device
from tests.framework.engine import FakeEngine
from tests.framework.kinds import SNAPSHOT_KINDS
from tests.framework.service import Host
from tests.framework.service import host as host

MIB = 1 << 20
KINDS = ("file", "memory", "device", "store", "rbd")
# What changes anything outside this process.
POOL_STEPS = (
    *("prepare", "discard", "create_backing", "remove_backing", "resize_backing"),
    *("create_snapshot", "remove_snapshot", "revert", "clone_backing", "clone_running", "flatten"),
)
ENGINE_STEPS = ("open_volume", "close_volume", "resize_volume", "attach", "detach")
POOLS: dict[str, type] = {
    "file": FilePool,
    "memory": MemoryPool,
    "device": DevicePool,
    "store": StorePool,
    "rbd": RbdPool,
}
UNDOING = ("volumes", "service", "pools", "snapshots")


class Killed(BaseException):
    """The process ends here: nothing is undone."""


@dataclass
class Killer:
    """Ends the process before or behind its `at`th step."""

    at: int
    behind: bool
    steps: list[str] = field(default_factory=list)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.steps.append(name)
            mine = len(self.steps) == self.at
            if mine and not self.behind:
                raise Killed
            result = real(*given, **named)
            if mine:
                raise Killed
            return result

        return call


@contextmanager
def no_undo(*_given: object, **_named: object) -> Iterator[UndoLater]:
    yield lambda what, undo: None


class Machine:
    """A host with a pool of some kind; volumes have names of their own in each round."""

    def __init__(self, host: Host, kind: str, record: PoolRecord) -> None:
        self.host = host
        self.kind = kind
        self.record = record
        self.name = "v"

    def make_pool(self) -> None:
        self.host.service.pools.create(self.record, erase=True)

    def create(self) -> None:
        self.host.service.volumes.create(self.name, "p", 8 * MIB, 512)

    def attach(self) -> None:
        self.host.service.attach(self.name)

    def detach(self) -> None:
        self.host.service.detach(self.name)

    def delete(self) -> None:
        self.host.service.volumes.delete(self.name)

    def grow(self) -> None:
        self.host.service.volumes.resize(self.name, 12 * MIB)

    def snapshot(self) -> None:
        Snapshots(self.host.service).create(self.name, "monday")

    def remove_snapshot(self) -> None:
        Snapshots(self.host.service).delete(self.name, "monday")

    def revert(self) -> None:
        Snapshots(self.host.service).revert(self.name, "monday")

    def clone(self) -> None:
        Snapshots(self.host.service).clone(self.name, "monday", f"{self.name}-clone")

    def clone_running(self) -> None:
        Snapshots(self.host.service).clone(self.name, None, f"{self.name}-clone")

    def flatten(self) -> None:
        Snapshots(self.host.service).flatten(f"{self.name}-clone")

    def delete_pool(self) -> None:
        self.host.service.pools.delete("p")

    def whole(self) -> None:
        """Whatever the store says is so, and nothing else is there."""
        store = self.host.store
        for volume in store.volumes():
            assert volume.state is VolumeState.READY, volume
            open_pool(store.pool(volume.pool)).check_backing(volume)
        attached = {one.volume for one in store.attachments()}
        assert {one.volume for one in self.host.engine.attachments()} == attached
        assert {one.name for one in self.host.engine.volumes()} == attached
        assert not [level for level in self.host.levels() if level[0] == "error"]
        if self.kind in ("file", "memory"):
            # A backing that is longer than its volume is used by the next growth.
            assert self.host.files() == sorted(f"{volume.name}.raw" for volume in store.volumes())

    def tidy(self) -> None:
        """Without anything, for the next round."""
        service = self.host.service
        for volume in self.host.store.volumes():
            if self.host.store.attachment(volume.name):
                service.detach(volume.name, force=True)
        clones_first = sorted(self.host.store.volumes(), key=lambda one: "clone" not in one.name)
        for volume in clones_first:
            if self.kind in SNAPSHOT_KINDS:
                for snapshot in Snapshots(service).list(volume.name):
                    Snapshots(service).delete(volume.name, snapshot.name)
            service.volumes.delete(volume.name)


# What is there before, and what is cut short.
OPERATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "create": ((), "create"),
    "delete": (("create",), "delete"),
    "attach": (("create",), "attach"),
    "detach": (("create", "attach"), "detach"),
    "grow": (("create",), "grow"),
    "grow attached": (("create", "attach"), "grow"),
}
SNAPSHOTS: dict[str, tuple[tuple[str, ...], str]] = {
    "snapshot": (("create", "attach"), "snapshot"),
    "remove snapshot": (("create", "snapshot"), "remove_snapshot"),
    "revert": (("create", "snapshot", "grow"), "revert"),
    "clone": (("create", "snapshot"), "clone"),
    "flatten": (("create", "snapshot", "clone"), "flatten"),
    "delete clone": (("create", "snapshot", "clone", "flatten", "remove_snapshot"), "delete"),
}
# What a store has beside.
LAYERS: dict[str, tuple[tuple[str, ...], str]] = {
    "clone of a volume in use": (("create", "attach"), "clone_running"),
}


@contextmanager
def engine(stats: Path) -> Iterator[None]:
    """A store is the engine's, though this gateway's serves nobody."""
    running = _engine.Engine([max(os.sched_getaffinity(0))], stats_path=str(stats))
    try:
        yield
    finally:
        running.stop()


@pytest.fixture
def machine(host: Host, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    kind = request.param
    if kind == "device":
        with loop_device(tmp_path / "device.img", 16 * MIB) as device:
            yield Machine(host, kind, PoolRecord("p", "file", str(device), None, 1))
        return
    if kind == "store":
        record = PoolRecord("p", "store", str(tmp_path / "drive"), None, 1, {"size": 256 * MIB})
        with engine(tmp_path / "stats"):
            machine = Machine(host, kind, record)
            yield machine
            machine.tidy()
        return
    if kind == "rbd":
        ceph: CephCluster = request.getfixturevalue("ceph")
        where = {"conf": str(ceph.conf_path), "user": "client.ringstone", "ceph_pool": "rbd"}
        machine = Machine(host, kind, PoolRecord("p", "rbd", None, None, 1, {**where}))
    else:
        path = str(host.memory / "p") if kind == "memory" else None
        machine = Machine(host, kind, PoolRecord("p", kind, path, None, 1))
    yield machine
    machine.tidy()


def cut_short(machine: Machine, operation: str, killer: Killer, monkeypatch: pytest.MonkeyPatch) -> bool:
    """False when it came to its end."""
    pool = POOLS[machine.kind]
    with monkeypatch.context() as patched:
        for module in UNDOING:
            patched.setattr(f"ringstone.gateway.{module}.undoing", no_undo)
        for step in POOL_STEPS:
            if hasattr(pool, step):
                patched.setattr(pool, step, killer.wrap(step, getattr(pool, step)))
        for step in ENGINE_STEPS:
            patched.setattr(FakeEngine, step, killer.wrap(step, getattr(FakeEngine, step)))
        patched.setattr(SqliteStore, "_commit", killer.wrap("commit", SqliteStore._commit))
        try:
            getattr(machine, operation)()
        except Killed:
            return True
    return False


def repeat(machine: Machine, operation: str) -> None:
    """As a person does who heard nothing; what is done already says so."""
    # What is as large already cannot grow, and what stands alone has no parent.
    done = (ExistsError, NotFoundError, *([InvalidError] if operation in ("grow", "flatten") else []))
    with suppress(*done):
        getattr(machine, operation)()


def every_step(
    machine: Machine, before: tuple[str, ...], operation: str, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The steps that it has."""
    number = 0
    while True:
        number += 1
        machine.name = f"v{number}"
        for step in before:
            getattr(machine, step)()
        killer = Killer(number, behind)
        if not cut_short(machine, operation, killer, monkeypatch):
            machine.tidy()
            return killer.steps
        machine.host.crash_and_restart()
        machine.whole()
        repeat(machine, operation)
        machine.whole()
        machine.tidy()


@pytest.mark.parametrize("machine", ["rbd"], indirect=True)
def test_a_revert_is_not_finished_behind_an_owner(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest has written since, and what it wrote would be gone."""
    machine.make_pool()
    machine.create()
    machine.snapshot()
    assert cut_short(machine, "revert", Killer(1, behind=False), monkeypatch)
    # Another host, which knows nothing of that.
    machine.host.service.attach("v")
    machine.host.service.detach("v")
    done: list[str] = []
    monkeypatch.setattr(RbdPool, "revert", lambda pool, volume, name: done.append(name))
    machine.host.crash_and_restart()
    assert done == []
    assert ("error", "v") in machine.host.levels()
    # And it is told once.
    machine.host.crash_and_restart()
    assert machine.host.levels() == []


CASES = [
    pytest.param(kind, *rest, id=f"{kind}-{name}")
    for kind in KINDS
    for name, rest in (
        OPERATIONS | (SNAPSHOTS if kind in SNAPSHOT_KINDS else {}) | (LAYERS if kind == "store" else {})
    ).items()
]


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize(("machine", "before", "operation"), CASES, indirect=["machine"])
def test_an_operation_is_done_or_undone_wherever_it_was_cut_short(
    machine: Machine,
    before: tuple[str, ...],
    operation: str,
    behind: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine.make_pool()
    steps = every_step(machine, before, operation, behind, monkeypatch)
    assert steps, "nothing was changed, so nothing was cut short"


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("machine", ["file", "memory", "store"], indirect=True)
def test_a_pool_is_made_or_not_and_gone_or_not(
    machine: Machine, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for operation, before in (("make_pool", ()), ("delete_pool", ("make_pool",))):
        number = 0
        while True:
            number += 1
            for step in before:
                getattr(machine, step)()
            if not cut_short(machine, operation, Killer(number, behind), monkeypatch):
                break
            machine.host.crash_and_restart()
            machine.whole()
            repeat(machine, operation)
            known = [pool.name for pool in machine.host.store.pools()]
            assert known == (["p"] if operation == "make_pool" else [])
            if known:
                machine.delete_pool()
            assert machine.record.path is None or not os.path.lexists(machine.record.path)
        if machine.host.store.pools():
            machine.delete_pool()
