"""A volume of a Ceph cluster under a load that knows the content of every block, while whatever it depends on dies: no
error reaches the guest, and nothing acknowledged is lost."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from ringstone import models
from ringstone.bench.reports import PatternReport
from ringstone.client import RemoteClient
from ringstone.errors import UnreachableError
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.lab.lab import Lab
from tests.framework.lab import wait_for
from tests.framework.pattern import MIB, RunningPattern, running_pattern

# Requests wait for what is away, and are not lost.
PATIENCE = {"stall_seconds": 90.0, "wait": "sleep"}
# Of a fault, before it is mended.
AWAY_SECONDS = 2.0


@pytest.fixture
def disk(manager: RemoteClient) -> models.Attachment:
    """Served by host a, and nowhere else unless somebody is asked."""
    manager.create_volume("disk", pool="ceph", size=64 * MIB)
    return manager.attach("disk", host="a", queues=2)


def requests(lab: Lab) -> int:
    """That host a has done in its gateway's life."""
    with lab.hosts["a"].client() as client:
        queues = client.stats(volume="disk").of_volume("disk")
    assert sum(queue.errors for queue in queues) == 0
    return sum(queue.reads + queue.writes for queue in queues)


def wait_for_progress(lab: Lab, more: int = 100) -> None:
    before = requests(lab)
    wait_for("the load to run on", lambda: requests(lab) >= before + more)


@contextmanager
def loaded(disk: models.Attachment) -> Iterator[RunningPattern]:
    with running_pattern(disk.socket, queues=2, depth=16, **PATIENCE) as load:
        yield load
    sound(load.report)
    print(f"longest gap {load.report.longest_gap_ns / 1e9:.2f} s, {load.report.iops:.0f} requests/s")


def sound(report: PatternReport) -> None:
    assert report.passed, report.findings
    assert report.blocks_checked == report.blocks_written > 0


def osd(lab: Lab) -> None:
    lab.ceph.kill_osd(1)
    time.sleep(AWAY_SECONDS)
    lab.ceph.start_osd(1)


def two_osds(lab: Lab) -> None:
    """Of three copies one is left, and Ceph takes no write before a second one is back."""
    lab.ceph.kill_osd(0)
    lab.ceph.kill_osd(2)
    time.sleep(AWAY_SECONDS)
    stalled = requests(lab)
    time.sleep(0.5)
    assert requests(lab) - stalled < 100, "it was to wait"
    lab.ceph.start_osd(0)
    lab.ceph.start_osd(2)


def monitor(lab: Lab) -> None:
    # OSDs that just came back need it to find one another.
    lab.ceph.wait_healthy()
    lab.ceph.kill_mon()
    try:
        # The data path does not.
        wait_for_progress(lab)
        time.sleep(AWAY_SECONDS)
    finally:
        lab.ceph.start_mon()


def gateway(lab: Lab) -> None:
    host = lab.hosts["a"]
    host.kill()
    host.forget_starts()
    host.start()


def etcd_leader(lab: Lab) -> None:
    """The two that are left elect another one, and the API goes on with that."""
    leader = lab.etcd.wait_for_leader()
    lab.etcd.kill(leader)
    try:
        with lab.managers[0].client() as manager:
            manager.create_volume("meanwhile", pool="ceph", size=MIB)
            manager.delete_volume("meanwhile")
        assert lab.etcd.wait_for_leader() != leader
        run_without_etcd(lab)
    finally:
        lab.etcd.restart(leader)


def full(lab: Lab) -> None:
    """Only for a load that writes, as reads do not wait; test_full_cluster.py tells more."""
    lab.ceph.set_full(True)
    try:
        time.sleep(AWAY_SECONDS)
        stalled = requests(lab)
        time.sleep(0.5)
        assert requests(lab) - stalled < 100, "it was to wait"
    finally:
        lab.ceph.set_full(False)


@pytest.mark.parametrize(
    ("fault", "rounds"),
    [
        # Of etcd and a full cluster, tests of their own and the guest's are the short forms.
        *((fault, 1) for fault in (osd, two_osds, monitor, gateway)),
        *(
            pytest.param(fault, 10, marks=pytest.mark.soak)
            for fault in (osd, two_osds, monitor, gateway, etcd_leader, full)
        ),
    ],
)
def test_whoever_dies_nothing_is_lost(
    lab: Lab, disk: models.Attachment, fault: Callable[[Lab], None], rounds: int
) -> None:
    with loaded(disk) as load:
        for _ in range(rounds):
            fault(lab)
            wait_for_progress(lab)
    assert load.report.reconnects == (rounds if fault is gateway else 0)
    lab.ceph.wait_healthy()


def test_the_data_path_does_not_need_etcd(lab: Lab, manager: RemoteClient, disk: models.Attachment) -> None:
    """First it does not answer, and then it is dead."""
    with loaded(disk), lab.hosts["a"].client() as at_a:
        for member in range(len(lab.etcd.members)):
            lab.etcd.pause(member)
        try:
            run_without_etcd(lab)
        finally:
            for member in range(len(lab.etcd.members)):
                lab.etcd.resume(member)
        for member in range(len(lab.etcd.members)):
            lab.etcd.kill(member)
        try:
            run_without_etcd(lab)
            with ThreadPoolExecutor() as pool:
                info, health = pool.submit(at_a.info), pool.submit(at_a.health)
                with pytest.raises(UnreachableError, match="etcd does not answer"):
                    manager.create_volume("other", pool="ceph", size=MIB)
            assert info.result().volumes is None
            assert "state is out of reach" in health.result().reasons[0]
        finally:
            lab.etcd.restart_all()
        wait_for_progress(lab)
        # Nothing came of what was refused.
        assert [volume.name for volume in manager.volumes()] == ["disk"]


def restarted(lab: Lab, name: str) -> None:
    """Its gateway dies and is started again."""
    lab.hosts[name].kill()
    lab.hosts[name].forget_starts()
    lab.hosts[name].start()


@contextmanager
def etcd_dead(lab: Lab) -> Iterator[None]:
    for member in range(len(lab.etcd.members)):
        lab.etcd.kill(member)
    try:
        yield
    finally:
        lab.etcd.restart_all()


def test_a_start_does_not_need_etcd(lab: Lab, manager: RemoteClient, disk: models.Attachment) -> None:
    """The cluster grants the host its epoch, and shuts the dead process out."""
    with loaded(disk):
        with etcd_dead(lab):
            for _ in range(2):
                restarted(lab, "a")
                wait_for_progress(lab)
        wait_for("the host to be back", lambda: manager.health().status == "ok")
        # Whoever takes over knows whom to shut out.
        wait_for_progress(lab)
    assert manager.attach("disk", host="b", take_over=True).host == "b"
    manager.detach("disk")


def test_a_start_without_etcd_serves_nothing_that_was_taken_over(
    lab: Lab, manager: RemoteClient, disk: models.Attachment
) -> None:
    lab.hosts["a"].kill()
    taken = manager.attach("disk", host="b", queues=2, take_over=True)
    with loaded(taken):
        with etcd_dead(lab):
            lab.hosts["a"].forget_starts()
            lab.hosts["a"].start()
            with lab.hosts["a"].client() as at_a:
                [refused] = at_a.attachments()
                assert refused.state == "failed"
                assert refused.reason is not None
                assert "does not own the volume any more" in refused.reason
        wait_for("the hosts to be back", lambda: manager.health().status == "ok")
        with lab.hosts["a"].client() as at_a:
            assert [one.host for one in at_a.attachments()] == ["b"]


def run_without_etcd(lab: Lab) -> None:
    """If it waited for etcd, this would wait in vain: etcd comes back behind it."""
    for _ in range(4):
        wait_for_progress(lab)


@pytest.mark.guest
def test_a_guest_notices_nothing_of_all_that(lab: Lab, disk: models.Attachment) -> None:
    job = FioJob(
        "verified",
        "randwrite",
        size=48 * MIB,
        verify="write",
        engine="libaio",
        depth=8,
        # So that it outlasts the faults.
        extra=("--rate_iops=450,450",),
    )
    with lab.boot("a", "disk") as guest:
        running = guest.start(fio_command(job))
        wait_for_progress(lab)
        # The first one while fio writes, and not yet reads back.
        for fault in (full, osd, monitor, etcd_leader, gateway):
            fault(lab)
            wait_for_progress(lab)
        result = parse_fio(running.wait(timeout_s=180).stdout)
        assert result.errors == 0
        assert result.write.operations == result.read.operations == 48 * MIB // 4096
        assert "error" not in guest.output("dmesg | grep vda || true")
    lab.ceph.wait_healthy()
