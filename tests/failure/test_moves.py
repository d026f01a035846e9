"""Queues that move between reactors, and reactors that come and go, under a load that must not notice."""

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import pytest

from ringstone.client import GatewayClient
from ringstone.errors import RingstoneError
from tests.framework.chance import chance as chance
from tests.framework.gateway import GatewayProcess
from tests.framework.pattern import RunningPattern, running_pattern

QUEUES = 4
CORES = sorted(os.sched_getaffinity(0))[:2]

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="queues move between two CPUs, and here is one")

RINGS = pytest.mark.parametrize("ring", [{"packed": False}, {"packed": True}], ids=["split", "packed"])


@contextmanager
def two_reactors(*arguments: str) -> Iterator[GatewayProcess]:
    with GatewayProcess(*arguments, cores=CORES) as gateway:
        yield gateway.start()


def cores_of(client: GatewayClient, volume: str = "disk") -> list[int | None]:
    """Where each queue runs, by CPU."""
    cores = {None: None} | {reactor.index: reactor.core for reactor in client.reactors()}
    return [cores.get(queue.reactor) for queue in client.attachment(volume).queue_states]


# Where tests have the mover see something else.
cores_now = cores_of


def other(core: int | None) -> int:
    return CORES[1] if core == CORES[0] else CORES[0]


def unnoticed(load: RunningPattern) -> None:
    report = load.report
    assert report.passed, report.findings
    assert (report.reconnects, report.missed_calls) == (0, 0)
    assert report.blocks_checked == report.blocks_written > 0


@RINGS
@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("moves", [20, pytest.param(400, marks=pytest.mark.soak)])
def test_queues_move_under_load(chance: random.Random, kind: str, ring: dict[str, Any], moves: int) -> None:
    with two_reactors("--no-balance") as gateway:
        volume = gateway.serve("disk", kind=kind, queues=QUEUES)
        moved = [0] * QUEUES
        with running_pattern(volume.socket, queues=QUEUES, **ring) as load, gateway.client() as client:
            for _ in range(moves):
                # Some at once, so that they cross each other on the way.
                for queue in chance.sample(range(QUEUES), chance.randint(1, QUEUES)):
                    client.move_queue("disk", queue, other(cores_of(client)[queue]))
                    moved[queue] += 1
                gateway.wait_for("the queues to arrive", lambda client: counted(client) == moved)
        unnoticed(load)


def counted(client: GatewayClient) -> list[int]:
    """Moves of each queue since the volume was attached."""
    return [queue.moves for queue in client.stats(volume="disk").of_volume("disk")]


@pytest.mark.parametrize("rounds", [1, pytest.param(50, marks=pytest.mark.soak)])
def test_reactors_come_and_go_under_load(rounds: int) -> None:
    first, second = map(str, CORES)
    with GatewayProcess("--no-balance", cores=CORES[:1]) as gateway:
        gateway.start()
        volume = gateway.serve("disk", queues=QUEUES)
        with running_pattern(volume.socket, queues=QUEUES) as load, gateway.client() as client:
            for _ in range(rounds):
                gateway.cli("reactor", "add", second)
                for queue in ("1", "3"):
                    gateway.cli("reactor", "move", "disk", queue, second)
                gateway.wait_for(
                    "two queues to move", lambda client: cores_of(client) == [*CORES[:2], *CORES[:2]]
                )
                assert f"{second}    disk:1 disk:3" in gateway.cli("reactor", "list").stdout
                # Returns when nothing runs there any more.
                gateway.cli("reactor", "remove", first)
                assert cores_of(client) == [CORES[1]] * QUEUES
                assert f"CPU {second};" in gateway.cli("status").stdout
                refused = gateway.cli("reactor", "remove", second, check=False)
                assert (refused.returncode, "is the only one" in refused.stderr) == (4, True)
                gateway.cli("reactor", "add", first)
                gateway.cli("reactor", "remove", second)
                assert cores_of(client) == [CORES[0]] * QUEUES
            # A slot is used again, and one that is free is shown to nobody.
            assert [reactor.state == "removed" for reactor in client.stats().reactors] == [False, True]
            shown = gateway.cli("top", "--count", "1", "--interval", "0.1").stdout
            lines = [line.rstrip() for line in shown.splitlines()]
            assert sum(line.endswith(("polling", "asleep", "removed")) for line in lines) == 1
        unnoticed(load)


class Mover:
    """Moves queues all the time, on a thread of its own; what that dies of is raised where it is waited for."""

    def __init__(self, gateway: GatewayProcess, chance: random.Random) -> None:
        self.told = 0
        # Cleared by whoever takes the gateway away.
        self.there = threading.Event()
        self.there.set()
        self._gateway, self._chance = gateway, chance
        self._enough = threading.Event()
        self._thread = ThreadPoolExecutor(1, "mover")
        self._run: Future[None] | None = None

    def run(self) -> None:
        while not self._enough.is_set():
            self.there.wait()
            # The gateway may go at any moment, and while it is being replaced it changes nothing.
            with contextlib.suppress(RingstoneError), self._gateway.client() as client:
                while not self._enough.is_set():
                    # None while the frontend reconnects.
                    if cores := cores_of(client):
                        queue = self._chance.randrange(QUEUES)
                        client.move_queue("disk", queue, other(cores[queue]))
                        self.told += 1

    def wait_for_moves(self) -> None:
        """Until some more queues have moved, whichever process moves them."""
        enough = self.told + 5
        self._gateway.wait_for("queues to move", lambda client: self._moved(client, enough))

    def _moved(self, client: GatewayClient, enough: int) -> bool:
        assert self._run is not None
        if self._run.done():
            self._run.result()
        return self.told > enough and sum(counted(client)) > 0

    def __enter__(self) -> Self:
        self._run = self._thread.submit(self.run)
        return self

    def __exit__(self, *error: object) -> None:
        self._enough.set()
        self.there.set()
        self._thread.shutdown()
        assert self._run is not None
        self._run.result()


def test_a_mover_goes_on_behind_a_moment_without_queues(
    chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died of one, while a frontend reconnected, and the test then waited a minute for moves."""
    moments = itertools.count()
    monkeypatch.setitem(globals(), "cores_of", lambda client: cores_now(client) if next(moments) else [])
    with two_reactors("--no-balance") as gateway:
        volume = gateway.serve("disk", queues=QUEUES)
        with running_pattern(volume.socket, queues=QUEUES) as load, Mover(gateway, chance) as mover:
            mover.wait_for_moves()
        unnoticed(load)


def test_a_mover_that_dies_ends_the_wait_for_it(
    chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "cores_of", lambda client: 1 // 0)
    with two_reactors("--no-balance") as gateway:
        gateway.serve("disk", queues=QUEUES)
        with pytest.raises(ZeroDivisionError), Mover(gateway, chance) as mover:
            mover.wait_for_moves()


@RINGS
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_an_upgrade_while_queues_move(chance: random.Random, ring: dict[str, Any], rounds: int) -> None:
    with two_reactors("--no-balance") as gateway:
        volume = gateway.serve("disk", queues=QUEUES)
        with (
            running_pattern(volume.socket, queues=QUEUES, **ring) as load,
            Mover(gateway, chance) as mover,
        ):
            for _ in range(rounds):
                mover.wait_for_moves()
                gateway.upgrade()
            mover.wait_for_moves()
        unnoticed(load)


@RINGS
@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_a_kill_while_queues_move(chance: random.Random, ring: dict[str, Any], rounds: int) -> None:
    with two_reactors("--no-balance") as gateway:
        volume = gateway.serve("disk", queues=QUEUES)
        with (
            running_pattern(volume.socket, queues=QUEUES, **ring) as load,
            Mover(gateway, chance) as mover,
        ):
            for _ in range(rounds):
                mover.wait_for_moves()
                mover.there.clear()
                gateway.kill()
                gateway.forget_starts()
                gateway.start()
                mover.there.set()
            mover.wait_for_moves()
        report = load.report
        assert report.passed, report.findings
        assert (report.reconnects, report.missed_calls) == (rounds, 0)


@contextmanager
def two_loads_on_one_reactor(gateway: GatewayProcess) -> Iterator[list[RunningPattern]]:
    volumes = ["first", "second"]
    sockets = [gateway.serve(volume, queues=1).socket for volume in volumes]
    with contextlib.ExitStack() as stack:
        loads = [stack.enter_context(running_pattern(socket, queues=1, depth=64)) for socket in sockets]
        with gateway.client() as client:
            for volume in volumes:
                client.move_queue(volume, 0, CORES[0])
        yield loads


def where(client: GatewayClient) -> list[int | None]:
    return cores_of(client, "first") + cores_of(client, "second")


def test_load_is_spread_over_the_reactors() -> None:
    with two_reactors() as gateway:
        with two_loads_on_one_reactor(gateway) as loads:
            gateway.wait_for("both on one reactor", lambda client: where(client) == [CORES[0]] * 2)
            gateway.wait_for(
                "each on its own", lambda client: sorted(map(str, where(client))) == [*map(str, CORES)]
            )
        for load in loads:
            unnoticed(load)


def test_without_balancing_queues_stay_where_they_are() -> None:
    with two_reactors("--no-balance") as gateway:
        with two_loads_on_one_reactor(gateway) as loads, gateway.client() as client:
            gateway.wait_for("both on one reactor", lambda client: where(client) == [CORES[0]] * 2)
            before = client.stats().reactors[0].busy_ns
            # Several times the work after which one of them would have gone.
            gateway.wait_for(
                "the reactor to work", lambda client: client.stats().reactors[0].busy_ns > before + 5e9
            )
            assert where(client) == [CORES[0]] * 2
        for load in loads:
            unnoticed(load)
