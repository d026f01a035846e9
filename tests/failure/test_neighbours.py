"""A guest beside others that do their worst. How little it notices is for `ringstone bench` to measure; here it has
to be served without an error and without standing still, and the others must have been bad."""

import contextlib
import os

import pytest

from ringstone.bench.greedy import LongReads
from ringstone.bench.storms import Connections, DeafFrontend, MemorySlots, MemoryTables, Storm
from tests.framework.gateway import GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.guest import backing_of
from tests.framework.pattern import MIB, RunningPattern, running_pattern

# Of each storm; thousands of these a second are usual.
ENOUGH = 2_000
# A client that waits for so long stands still.
STILL_NS = 1_000_000_000
# Of 60 MiB each; more than the greedy guest has in flight.
LONG_READS = 128


def unnoticed(load: RunningPattern, still_ns: int = STILL_NS) -> None:
    report = load.report
    assert report.passed, report.findings
    assert (report.reconnects, report.missed_calls) == (0, 0)
    assert report.blocks_checked == report.blocks_written > 0
    # By the client's own clock, and a share of its run rather than a time. A machine that is merely busy holds nobody
    # up for so long over and over again.
    still = sum(gap.duration_ns for gap in report.gaps if gap.duration_ns > still_ns)
    assert still < report.seconds * 1e9 / 2, report.gaps


def blow(gateway: GatewayProcess, *storms: Storm) -> None:
    """Until each has done its worst."""
    with contextlib.ExitStack() as stack:
        for storm in storms:
            stack.enter_context(storm)
        gateway.wait_for(
            "the storms", lambda client: all(storm.count > ENOUGH or storm.failed for storm in storms)
        )


@pytest.mark.parametrize("kind", [MemoryTables, MemorySlots, Connections, DeafFrontend])
def test_a_storm_disturbs_nobody_else(gateway: GatewayProcess, kind: type[Storm]) -> None:
    quiet = gateway.serve("quiet", queues=2)
    wild = gateway.serve("wild", queues=1)
    with running_pattern(quiet.socket, queues=2, rate=2000) as load:
        storm = kind(wild.socket)
        blow(gateway, storm)
        assert storm.count > ENOUGH
        gateway.wait_for(
            "the other frontend to be gone", lambda client: client.attachment("wild").peer_pid is None
        )
        assert is_served(wild.socket)
    unnoticed(load)


@pytest.mark.soak
def test_a_guest_that_reads_as_much_as_it_can_holds_nobody_up(gateway: GatewayProcess) -> None:
    """The kernel was once given all of a batch of long reads at once: a neighbour stood still for two seconds. It reads
    eight gigabytes, for which a drive that others use may take minutes."""
    quiet = gateway.serve("quiet", queues=2)
    greedy = gateway.serve("greedy", kind="file", size=64 * MIB, queues=8)
    with backing_of(gateway, "greedy").open("r+b") as backing:
        for _ in range(64):
            backing.write(os.urandom(MIB))
        os.fsync(backing.fileno())
    with (
        running_pattern(quiet.socket, queues=2, rate=2000) as load,
        LongReads(greedy.socket, queues=8) as storm,
    ):
        gateway.wait_for("the long reads", lambda client: storm.count > LONG_READS or storm.failed)
    assert storm.count > LONG_READS
    unnoticed(load, still_ns=100_000_000)


def is_served(socket: str) -> bool:
    """The volume that was stormed is a volume like any other afterwards."""
    with running_pattern(socket, queues=1) as load:
        pass
    return load.report.passed


def test_who_does_not_read_is_disconnected(gateway: GatewayProcess) -> None:
    """Or it would keep what it is owed in the gateway's memory, or the control thread waiting."""
    wild = gateway.serve("wild", queues=1)
    blow(gateway, DeafFrontend(wild.socket))
    with gateway.client() as client:
        messages = [event.message for event in client.events(volume="wild", limit=1000)]
    assert any("does not read" in message for message in messages), messages[-3:]


def test_all_storms_together_disturb_nobody_else(gateway: GatewayProcess) -> None:
    quiet = gateway.serve("quiet", kind="file", queues=2)
    kinds: list[type[Storm]] = [MemoryTables, MemorySlots, Connections, DeafFrontend]
    wild = {kind: gateway.serve(f"wild-{kind.__name__.lower()}", queues=1).socket for kind in kinds}
    with running_pattern(quiet.socket, queues=2, rate=2000) as load:
        blow(gateway, *(kind(socket) for kind, socket in wild.items()))
    unnoticed(load)
