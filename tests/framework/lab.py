"""A real cluster for tests: started when the first test of a run asks for it, and stopped at the run's end.

A test that breaks something mends it again, and waits until it is (`ceph.wait_healthy()`): the next test has the same
cluster.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.lab.ceph import CephCluster
from ringstone.lab.lab import Lab, LabSettings

_EVENT_SECONDS = 90


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephCluster]:
    """Ceph alone, on this machine's loopback address: a monitor, a manager, three OSDs, the pool `rbd`."""
    with CephCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Ceph, an etcd of three members, two hosts `a` and `b` with a gateway each, and two managers. Another Ceph than
    that of the fixture `ceph`, as a host's partition takes a network of its own."""
    if os.geteuid() != 0:
        pytest.skip("Network namespaces take root.")
    with Lab(LabSettings(managers=2, etcd_members=3)) as running:
        yield running


@pytest.fixture
def manager(lab: Lab) -> Iterator[RemoteClient]:
    """A client of the first manager, with a pool `ceph` on all hosts. All hosts live before and after."""
    where = models.RbdOptions(conf=str(lab.ceph.conf_path), user="client.ringstone", ceph_pool="rbd")
    with lab.managers[0].client() as client:
        wait_for("all hosts", lambda: all(host.alive for host in client.hosts()))
        client.create_pool(models.PoolCreate(name="ceph", type="rbd", rbd=where))
        yield client
        for host in lab.hosts.values():
            if not host.gateway_runs():
                host.forget_starts()
                host.start()
        wait_for("all hosts", lambda: all(host.alive for host in client.hosts()))
        for volume in client.volumes():
            if volume.attachment is not None:
                client.detach(volume.name, force=True)
            for snapshot in client.snapshots(volume.name) if volume.pool == "ceph" else []:
                client.delete_snapshot(volume.name, snapshot.name)
            client.delete_volume(volume.name)
        for pool in client.pools():
            client.delete_pool(pool.name)


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it is true."""
    deadline = time.monotonic() + _EVENT_SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"Waited {_EVENT_SECONDS} s for {what}.")
        time.sleep(0.1)
    return found
