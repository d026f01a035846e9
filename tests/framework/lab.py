"""A real cluster for tests: started when the first test of a run asks for it, and stopped at the run's end.

A test that breaks something mends it again, and waits until it is (`ceph.wait_healthy()`): the next test has the same
cluster.
"""

import os
from collections.abc import Iterator

import pytest

from ringstone.lab.ceph import CephCluster
from ringstone.lab.lab import Lab, LabSettings


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephCluster]:
    """Ceph alone, on this machine's loopback address: a monitor, a manager, three OSDs, the pool `rbd`."""
    with CephCluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Ceph, etcd, two hosts `a` and `b` with a gateway each, and two managers. Another Ceph than that of the fixture
    `ceph`, as a host's partition takes a network of its own."""
    if os.geteuid() != 0:
        pytest.skip("Network namespaces take root.")
    with Lab(LabSettings(managers=2)) as running:
        yield running
