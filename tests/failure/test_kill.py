"""A gateway that is killed at any moment, over and over, under a load that knows the content of every block: at the
end nothing acknowledged is lost, nothing was completed twice, and no error has reached the guest."""

import itertools
import random
import time

import pytest

from ringstone.client import GatewayClient
from tests.framework.chance import chance as chance
from tests.framework.gateway import GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.pattern import running_pattern

QUEUES = 4
# How long after the load runs again the gateway is killed.
LATEST_SECONDS = 0.2


def runs_on(client: GatewayClient) -> bool:
    """Every queue has completed requests in this gateway's life, which began with counters at zero."""
    state = client.attachments()[0].state
    assert state != "needs_reset", "the rings were not taken up where they were"
    queues = client.stats(volume="disk").of_volume("disk")
    assert sum(queue.errors for queue in queues) == 0
    return len(queues) == QUEUES and all(queue.reads and queue.writes for queue in queues)


def resubmitted(client: GatewayClient) -> int:
    return sum(queue.resubmitted for queue in client.stats(volume="disk").of_volume("disk"))


def start_with_kills(gateway: GatewayProcess, chance: random.Random, kills: int, whole_s: float) -> None:
    """Start a gateway that is killed `kills` times on the way: before it has its attachments back, in the middle
    of taking them up, or when the guest has just reconnected. `whole_s` is how long a start takes."""
    for _ in range(kills):
        gateway.forget_starts()
        gateway.launch()
        time.sleep(chance.uniform(0, whole_s * 1.2))
        gateway.kill()
    gateway.forget_starts()
    gateway.start()


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        *itertools.product(["memory", "file"], [False, True]),
        ("store", True),
        ("sealed", True),
        pytest.param("store", False, marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("rounds", [8, pytest.param(200, marks=pytest.mark.soak)])
def test_a_gateway_killed_at_any_moment_loses_nothing(
    gateway: GatewayProcess, chance: random.Random, kind: str, packed: bool, rounds: int
) -> None:
    begun = time.monotonic()
    gateway.restart()
    whole_s = time.monotonic() - begun
    volume = gateway.serve("disk", kind=kind, queues=QUEUES)
    again = 0
    with (
        running_pattern(volume.socket, queues=QUEUES, depth=32, packed=packed) as load,
        gateway.client() as client,
    ):
        for number in range(rounds):
            time.sleep(chance.uniform(0, LATEST_SECONDS))
            gateway.kill()
            # Every other round, so that half of the deaths follow a life in which the load ran.
            start_with_kills(gateway, chance, number % 2, whole_s)
            gateway.wait_for("the load to run on", runs_on)
            again += resubmitted(client)
    report = load.report
    assert report.passed, report.findings
    assert report.errors == report.lost == report.doubled == report.stuck == 0
    assert report.reconnects >= rounds
    assert report.missed_calls == 0
    assert report.blocks_checked == report.blocks_written > 0
    # A volume in memory does a request as it takes it, and few kills come in between.
    assert again > 0 or kind == "memory", "no kill found a request in flight"
