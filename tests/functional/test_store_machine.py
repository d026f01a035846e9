"""Whatever is done to the volumes of a store, in whatever order, over the API and by guests: each volume and snapshot
has the content that a model in memory has, and when all is deleted the room is back.

Hypothesis chooses the operations. `RINGSTONE_TEST_SEED=` has it choose the same ones again.
"""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, configuration, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ringstone.errors import BusyError, InvalidError
from ringstone.models import PoolCreate, StoreOptions
from ringstone.pools import store_door
from tests.framework.gateway import GatewayProcess
from tests.framework.scripts import SECTOR, Scripts, content, read, write

KIB, MIB = 1 << 10, 1 << 20
DRIVE = 96 * MIB
MOST_VOLUMES = 6
MOST_SNAPSHOTS = 4
LARGEST_REQUEST = 96 * KIB
READ_SIZE = 64 * KIB
# What `make test` does, always the same. A start of the gateway takes as long as all else in a run.
SEED, RUNS, STEPS, STARTS = 1, 9, 50, 1
SOAK_SECONDS = float(os.environ.get("RINGSTONE_SOAK_SECONDS", "600"))
SOAK_RUNS_PER_SECOND, SOAK_STEPS, SOAK_STARTS = 0.2, 80, 3

configuration.set_hypothesis_home_dir(Path(__file__).resolve().parents[2] / ".cache" / "hypothesis")

# Small, so that requests meet.
sizes = st.integers(1, 10).map(lambda part: part * 40 * KIB)
# A request: what, and where and how long in these units, which is cut to the volume.
requests = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "discard", "zero", "unmap", "flush"]),
        st.sampled_from([SECTOR, 4 * KIB, 16 * KIB]),
        st.integers(0, 100),
        st.integers(1, 12),
    ),
    min_size=2,
    max_size=8,
)


@dataclass
class Modelled:
    """A volume as it should be. `origin`: the volume and snapshot that it was cloned from, until it is flattened."""

    content: bytearray
    integrity: bool
    origin: tuple[str, str] | None = None
    snapshots: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Bench:
    """What all runs share. `starts`: of the gateway in a run, at most."""

    gateway: GatewayProcess
    scripts: Scripts
    starts: int = STARTS
    pools: int = 0


@pytest.fixture
def bench(gateway: GatewayProcess, tmp_path: Path) -> Iterator[Bench]:
    with Scripts(tmp_path / "client.log") as scripts:
        yield Bench(gateway, scripts)


class StoreMachine(RuleBasedStateMachine):
    """One run: a pool of its own, which is gone at the end."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._gateway, self._scripts = bench.gateway, bench.scripts
        bench.pools += 1
        self._pool = f"pool-{bench.pools}"
        self._drive = self._gateway.root / self._pool
        self._volumes: dict[str, Modelled] = {}
        self._names = 0
        self._starts = bench.starts
        self._stack = ExitStack()
        self._connect()

    def _connect(self) -> None:
        self._client = self._stack.enter_context(self._gateway.client())

    def _new_name(self, what: str) -> str:
        self._names += 1
        # Names are the host's.
        return f"{self._pool}-{what}-{self._names}"

    # what a rule is about

    def _pick(self, data: st.DataObject, label: str = "volume") -> str:
        return data.draw(st.sampled_from(sorted(self._volumes)), label)

    def _pick_snapshot(self, data: st.DataObject) -> tuple[str, str]:
        of_all = sorted((name, one) for name, volume in self._volumes.items() for one in volume.snapshots)
        return data.draw(st.sampled_from(of_all), "snapshot")

    def _has_volumes(self) -> bool:
        return bool(self._volumes)

    def _has_snapshots(self) -> bool:
        return any(volume.snapshots for volume in self._volumes.values())

    def _has_room(self) -> bool:
        return len(self._volumes) < MOST_VOLUMES

    def _socket(self, name: str) -> str:
        return self._client.attachment(name).socket

    def _clones_of(self, name: str, snapshot: str) -> list[str]:
        return [clone for clone, volume in self._volumes.items() if volume.origin == (name, snapshot)]

    def _expect(self, name: str, expected: bytes) -> None:
        spans = range(0, len(expected), READ_SIZE)
        asked = [read(at, min(READ_SIZE, len(expected) - at)) for at in spans]
        for at, result in zip(spans, self._scripts.run(self._socket(name), asked), strict=True):
            found, wanted = bytes.fromhex(result["text"]), expected[at : at + READ_SIZE]
            if found != wanted:
                wrong = next(n for n in range(len(wanted)) if found[n] != wanted[n])
                raise AssertionError(f"{name} differs from byte {at + wrong} on")

    # operations

    @initialize(extent=st.sampled_from([16 * KIB, 64 * KIB]))
    def make_pool(self, extent: int) -> None:
        store = StoreOptions(size=DRIVE, extent=extent)
        self._client.create_pool(
            PoolCreate(name=self._pool, type="store", path=str(self._drive), store=store)
        )
        self._used = self._used_now()

    @precondition(_has_room)
    @rule(size=sizes, integrity=st.booleans())
    def create(self, size: int, integrity: bool) -> None:
        name = self._new_name("v")
        self._client.create_volume(name, pool=self._pool, size=size, integrity=integrity)
        self._volumes[name] = Modelled(bytearray(size), integrity)
        self._client.attach(name)

    @precondition(_has_volumes)
    @rule(asked=st.lists(requests, min_size=3, max_size=MOST_VOLUMES))
    def use(self, asked: list[list[tuple[str, int, int, int]]]) -> None:
        for name, of_one in zip(self._volumes, asked, strict=False):
            self._use(name, of_one)

    def _use(self, name: str, asked: list[tuple[str, int, int, int]]) -> None:
        held = self._volumes[name].content
        operations: list[dict[str, Any]] = []
        for what, unit, where, count in asked:
            offset = where * unit % len(held)
            length = min(count * unit, LARGEST_REQUEST, len(held) - offset)
            span = {"offset": offset, "len": length}
            if what == "flush":
                operations.append({"op": "flush"})
                continue
            if what == "write":
                self._names += 1
                new = content(self._names, length)
                operations.append(write(offset, new))
            else:
                new = bytes(length)
                operations.append(
                    {"op": "discard", **span}
                    if what == "discard"
                    else {"op": "write_zeroes", "unmap": what == "unmap", **span}
                )
            held[offset : offset + length] = new
        self._scripts.run(self._socket(name), operations)

    @precondition(_has_volumes)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        name = self._pick(data)
        self._expect(name, bytes(self._volumes[name].content))

    @precondition(_has_volumes)
    @rule(data=st.data(), more=sizes)
    def grow(self, data: st.DataObject, more: int) -> None:
        name = self._pick(data)
        held = self._volumes[name].content
        held.extend(bytes(more // 2))
        self._client.resize_volume(name, len(held))

    @precondition(_has_volumes)
    @rule(data=st.data(), together=st.integers(1, 3))
    def snapshot(self, data: st.DataObject, together: int) -> None:
        able = [name for name in sorted(self._volumes) if len(self._volumes[name].snapshots) < MOST_SNAPSHOTS]
        if not able:
            return
        chosen = data.draw(st.permutations(able), "volumes")[:together]
        snapshot = self._new_name("s")
        self._client.create_snapshot(chosen[0], snapshot, also=chosen[1:])
        for name in chosen:
            self._volumes[name].snapshots[snapshot] = bytes(self._volumes[name].content)

    @precondition(lambda self: self._has_snapshots() and self._has_room())
    @rule(data=st.data())
    def clone_a_snapshot(self, data: st.DataObject) -> None:
        parent, snapshot = self._pick_snapshot(data)
        self._clone(parent, snapshot, self._new_name("c"))

    def _clone(self, parent: str, snapshot: str, name: str) -> None:
        self._client.clone_snapshot(parent, snapshot, name)
        of = self._volumes[parent]
        self._volumes[name] = Modelled(bytearray(of.snapshots[snapshot]), of.integrity, (parent, snapshot))
        self._client.attach(name)

    @precondition(lambda self: self._has_volumes() and self._has_room())
    @rule(data=st.data())
    def clone_a_running_volume(self, data: st.DataObject) -> None:
        parent, name = self._pick(data), self._new_name("c")
        self._client.clone_volume(parent, name)
        of = self._volumes[parent]
        self._volumes[name] = Modelled(bytearray(of.content), of.integrity)
        self._client.attach(name)

    @precondition(_has_snapshots)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        name, snapshot = self._pick_snapshot(data)
        self._client.detach(name, force=True)
        self._client.revert(name, snapshot)
        self._client.attach(name)
        volume = self._volumes[name]
        then = volume.snapshots[snapshot]
        volume.content[:] = then + bytes(len(volume.content) - len(then))

    @precondition(_has_volumes)
    @rule(data=st.data())
    def flatten(self, data: st.DataObject) -> None:
        name = self._pick(data)
        if self._volumes[name].origin is None:
            with pytest.raises(InvalidError):
                self._client.flatten(name)
            return
        self._client.flatten(name)
        self._volumes[name].origin = None

    @precondition(_has_snapshots)
    @rule(data=st.data())
    def delete_a_snapshot(self, data: st.DataObject) -> None:
        name, snapshot = self._pick_snapshot(data)
        if self._clones_of(name, snapshot):
            with pytest.raises(BusyError):
                self._client.delete_snapshot(name, snapshot)
            return
        self._client.delete_snapshot(name, snapshot)
        del self._volumes[name].snapshots[snapshot]

    @precondition(_has_volumes)
    @rule(data=st.data())
    def delete_a_volume(self, data: st.DataObject) -> None:
        name = self._pick(data)
        self._client.detach(name, force=True)
        if self._volumes[name].snapshots:
            with pytest.raises(BusyError):
                self._client.delete_volume(name)
            self._client.attach(name)
            return
        self._client.delete_volume(name)
        del self._volumes[name]

    @precondition(_has_snapshots)
    @rule(data=st.data())
    def compare(self, data: st.DataObject) -> None:
        """Where a volume has changed since a snapshot is in its difference from that."""
        name, snapshot = self._pick_snapshot(data)
        ranges = self._client.diff(name, since=snapshot).ranges
        volume = self._volumes[name]
        now, then = volume.content, volume.snapshots[snapshot]
        for at in range(0, len(then), 4 * KIB):
            if now[at : at + 4 * KIB] != then[at : at + 4 * KIB]:
                assert any(offset <= at < offset + length for offset, length in ranges), (name, at)

    @precondition(lambda self: self._has_volumes() and self._starts)
    @rule(how=st.sampled_from(["kill", "kill", "restart", "upgrade"]))
    def begin_anew(self, how: str) -> None:
        self._starts -= 1
        self._stack.close()
        if how == "kill":
            self._gateway.kill()
            report = store_door.check(str(self._drive))
            assert report.faults == ()
            assert {one.name for one in report.volumes} == set(self._volumes)
            self._gateway.forget_starts()
            self._gateway.start()
        else:
            {"restart": self._gateway.restart, "upgrade": self._gateway.upgrade}[how]()
        self._connect()

    # the end

    def teardown(self) -> None:
        with self._stack:
            self._look_at_everything()
            self._delete_everything()

    def _look_at_everything(self) -> None:
        for name, volume in list(self._volumes.items()):
            self._expect(name, bytes(volume.content))
            assert self._client.volume(name).integrity == volume.integrity
            assert [one.name for one in self._client.snapshots(name)] == list(volume.snapshots)
            for snapshot, then in volume.snapshots.items():
                clone = self._new_name("look")
                self._clone(name, snapshot, clone)
                self._expect(clone, then)
                self._remove(clone)

    def _delete_everything(self) -> None:
        while self._volumes:
            for name, volume in list(self._volumes.items()):
                for snapshot in list(volume.snapshots):
                    if not self._clones_of(name, snapshot):
                        self._client.delete_snapshot(name, snapshot)
                        del volume.snapshots[snapshot]
                if not volume.snapshots:
                    self._remove(name)
        self._gateway.wait_for("room to come back", lambda client: self._used_now() == self._used)
        self._client.delete_pool(self._pool)
        assert not self._drive.exists()

    def _remove(self, name: str) -> None:
        self._client.detach(name, force=True)
        self._client.delete_volume(name)
        del self._volumes[name]

    def _used_now(self) -> tuple[int, int, int]:
        space = self._client.pool(self._pool).space
        assert space is not None
        return space.used, space.reclaiming, space.promised


def run(bench: Bench, runs: int, steps: int, chosen: int, *phases: Phase) -> None:
    print(f"RINGSTONE_TEST_SEED={chosen}")

    @seed(chosen)
    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(bench)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            database=None,
            deadline=None,
            phases=[Phase.generate, *phases],
            suppress_health_check=list(HealthCheck),
        ),
    )


def chosen_seed(otherwise: int) -> int:
    return int(os.environ.get("RINGSTONE_TEST_SEED") or otherwise)


def test_volumes_and_snapshots_are_what_the_model_says(bench: Bench) -> None:
    """What fails is shown as it was found, as making it smaller takes minutes."""
    run(bench, RUNS, STEPS, chosen_seed(SEED))


@pytest.mark.soak
def test_volumes_and_snapshots_stay_what_the_model_says(bench: Bench) -> None:
    bench.starts = SOAK_STARTS
    runs = max(1, int(SOAK_SECONDS * SOAK_RUNS_PER_SECOND))
    run(bench, runs, SOAK_STEPS, chosen_seed(random.SystemRandom().getrandbits(32)), Phase.shrink)
