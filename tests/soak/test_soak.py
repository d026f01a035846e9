"""What only time brings out: verification that goes on and on while everything around it comes and goes."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from ringstone.bench.process import resident_bytes, run_job
from ringstone.client import GatewayClient
from tests.framework.gateway import GatewayProcess

SECONDS = float(os.environ.get("RINGSTONE_SOAK_SECONDS", "600"))
MIB = 1 << 20
# What may be more at the end than after the first round: the gateway's heap breathes, and connections of its API
# close when they have been idle for a while. A leak in each round is soon beyond both.
RESIDENT_SLACK = 16 * MIB
DESCRIPTOR_SLACK = 4

pytestmark = pytest.mark.soak


def verify(socket: str, seed: int, operations: int) -> None:
    """One connection of an independent client, with every answer checked against a model of the volume."""
    report: dict[str, Any] = run_job(
        "load", {"mode": "verify", "socket": socket, "operations": operations, "queues": 2, "seed": seed}
    )
    assert report["passed"], f"seed {seed}: {report['findings']}"


def come_and_go(gateway: GatewayProcess, client: GatewayClient, seed: int) -> None:
    """A volume's whole life, beside the others."""
    name = f"passing-{seed}"
    size = (1 + seed % 8) * MIB
    attachment = gateway.serve(
        name, kind=("memory", "file")[seed % 2], size=size, block_size=(512, 4096)[seed % 2], queues=2
    )
    verify(attachment.socket, seed, operations=200)
    client.resize_volume(name, size + MIB)
    verify(attachment.socket, seed, operations=200)
    client.stats(volume=name)
    client.detach(name)
    client.delete_volume(name)


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def settled(gateway: GatewayProcess) -> tuple[int, int]:
    """Open descriptors and resident bytes of the gateway once nobody is connected."""
    gateway.wait_for(
        "all frontends to be gone",
        lambda client: all(attachment.state == "listening" for attachment in client.attachments()),
    )
    return open_descriptors(gateway.pid), resident_bytes(gateway.pid)


def test_nothing_is_lost_and_nothing_leaks_while_volumes_come_and_go() -> None:
    with GatewayProcess() as gateway:
        gateway.start()
        staying = [
            gateway.serve(f"staying-{kind}", kind=kind, queues=2).socket for kind in ("memory", "file")
        ]
        with gateway.client() as client:

            def round_of(seed: int) -> None:
                with ThreadPoolExecutor() as pool:
                    jobs = [pool.submit(verify, socket, seed, 5_000) for socket in staying]
                    jobs.append(pool.submit(come_and_go, gateway, client, seed))
                    for job in jobs:
                        job.result()

            round_of(0)
            descriptors, resident = settled(gateway)
            end = time.monotonic() + SECONDS
            for seed in count(1):
                round_of(seed)
                if time.monotonic() > end:
                    break
            descriptors_now, resident_now = settled(gateway)
            assert descriptors_now - descriptors <= DESCRIPTOR_SLACK
            assert resident_now - resident <= RESIDENT_SLACK
            assert [event for event in client.events(limit=1000) if event.level == "error"] == []
