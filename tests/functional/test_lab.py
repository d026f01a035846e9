"""The lab itself: that what tests rely on works, and that nothing of it is left."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ringstone.lab import folders, network
from ringstone.lab.ceph import CephCluster, CephCommandError
from ringstone.lab.lab import Lab
from ringstone.lab.process import LabError, run
from tests.framework.gateway import RINGSTONE
from tests.framework.guest import wait_until

BLOCK = bytes(range(256)) * 4096
_EVENT_SECONDS = 60


def import_image(ceph: CephCluster, folder: Path, name: str, data: bytes = BLOCK) -> None:
    source = folder / name
    source.write_bytes(data)
    ceph.rbd("import", str(source), f"rbd/{name}")


def export_image(ceph: CephCluster, folder: Path, name: str) -> bytes:
    target = folder / f"{name}.out"
    target.unlink(missing_ok=True)
    ceph.rbd("export", f"rbd/{name}", str(target))
    return target.read_bytes()


# Ceph.


def test_an_image_keeps_what_is_written(ceph: CephCluster, tmp_path: Path) -> None:
    import_image(ceph, tmp_path, "kept")
    assert export_image(ceph, tmp_path, "kept") == BLOCK
    assert "kept" in ceph.rbd("ls").split()
    ceph.rbd("rm", "rbd/kept")


def test_a_dead_osd_is_noticed_and_comes_back(ceph: CephCluster, tmp_path: Path) -> None:
    ceph.kill_osd(1)
    ceph.wait_osd_down(1)
    import_image(ceph, tmp_path, "degraded")
    assert not ceph.daemon("osd.1").running()
    ceph.start_osd(1)
    ceph.wait_healthy()
    assert export_image(ceph, tmp_path, "degraded") == BLOCK
    ceph.rbd("rm", "rbd/degraded")


def test_a_stopped_osd_is_noticed_and_comes_back(ceph: CephCluster) -> None:
    ceph.pause_osd(2)
    try:
        ceph.wait_osd_down(2)
    finally:
        ceph.resume_osd(2)
    ceph.wait_osd_up(2)
    ceph.wait_healthy()


def test_monitor_and_manager_come_back(ceph: CephCluster) -> None:
    ceph.kill_mon()
    ceph.kill_mgr()
    assert ceph.admin("osd.0", "status")["state"] == "active"
    ceph.start_mon()
    ceph.start_mgr()
    ceph.wait_healthy()


def test_a_pool_fills_and_has_room_again(ceph: CephCluster, tmp_path: Path) -> None:
    ceph.create_pool("small", size=2)
    try:
        ceph.set_quota("small", 1 << 20)
        ceph.rbd("create", "--size", "16M", "small/image")
        ceph.rbd("bench", "--io-type", "write", "--io-total", "4M", "small/image")
        ceph.wait_pool_full("small")
        ceph.set_quota("small", 0)
        ceph.wait_pool_full("small", full=False)
        ceph.set_full(True)
        ceph.set_full(False)
    finally:
        ceph.delete_pool("small")
    ceph.wait_healthy()


def test_keys_are_checked(ceph: CephCluster) -> None:
    """Wrong keyrings are a subject of tests, so Ceph must refuse them here too."""
    keyring = ceph.add_client("reader", {"mon": "profile rbd", "osd": "profile rbd-read-only"})
    assert ceph.rbd("ls", client="reader") == ceph.rbd("ls")
    with pytest.raises(LabError, match="not permitted"):
        ceph.rbd("create", "--size", "1M", "rbd/refused", client="reader")
    keyring.write_text(ceph.keyring_path().read_text().replace("client.ringstone", "client.reader"))
    with pytest.raises(LabError):
        ceph.rbd("ls", client="reader")


def test_a_refused_command_says_why(ceph: CephCluster) -> None:
    with pytest.raises(CephCommandError, match=r"ENOENT.*unrecognized pool 'none'"):
        ceph.command("osd pool get", pool="none", var="size")


def test_blocklisted_clients_are_listed(ceph: CephCluster) -> None:
    before = ceph.blocklist()
    ceph.command("osd blocklist", blocklistop="add", addr="127.0.0.1:0/7")
    assert set(ceph.blocklist()) == {*before, "127.0.0.1:0/7"}
    ceph.command("osd blocklist", blocklistop="rm", addr="127.0.0.1:0/7")
    assert ceph.blocklist() == before


# Hosts.


def reaches(lab: Lab, host: str, address: str) -> bool:
    """Whether `address` answers `host`, by refusing a connection to a port where nobody listens."""
    ask = (
        "import socket, sys; s = socket.socket(); s.settimeout(2); "
        f"sys.exit(0 if s.connect_ex(({address!r}, 9)) == 111 else 1)"
    )
    try:
        lab.hosts[host].run("/usr/bin/python3", "-c", ask)
    except LabError:
        return False
    return True


def test_a_host_is_cut_off_and_connected_again(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    assert reaches(lab, "a", b.address)
    assert reaches(lab, "a", lab.network.address)
    a.partition()
    try:
        assert not reaches(lab, "a", b.address)
        assert not reaches(lab, "a", lab.network.address)
        assert reaches(lab, "b", lab.network.address)
        # Its own sockets are no part of the network, and what is served needs no etcd.
        with a.client() as client:
            assert [reactor.core for reactor in client.reactors()] == a.cores
    finally:
        a.heal()
    assert reaches(lab, "a", b.address)


def test_etcd_loses_a_member_and_gets_it_back(lab: Lab) -> None:
    lab.network.partition("etcd0")
    try:
        with pytest.raises(LabError):
            run(etcdctl(lab, "endpoint", "health"))
    finally:
        lab.network.heal("etcd0")
    wait_for_members(lab)
    run(etcdctl(lab, "put", "kept", "value"))
    lab.etcd.kill(0)
    lab.etcd.restart(0)
    wait_for_members(lab)
    assert run(etcdctl(lab, "get", "kept", "--print-value-only")).strip() == "value"


def wait_for_members(lab: Lab) -> None:
    """Until each of them answers: one that was away comes back with a later term and costs an election."""

    def healthy() -> bool:
        try:
            run(etcdctl(lab, "endpoint", "health"))
        except LabError:
            return False
        return True

    wait_until(healthy, "all members of etcd answer")


def etcdctl(lab: Lab, *arguments: str) -> list[str]:
    """As root."""
    password = lab.etcd_access.root_password_file.read_text().strip()
    environment = lab.etcd_access.environment(lab.etcd) | {"ETCDCTL_USER": f"root:{password}"}
    options = ("--command-timeout", "2s", "--dial-timeout", "2s")
    return [
        "env",
        *(f"{name}={value}" for name, value in environment.items()),
        "etcdctl",
        *options,
        *arguments,
    ]


def test_a_host_uses_ceph_over_its_own_network(lab: Lab) -> None:
    rbd = ("rbd", "--conf", str(lab.ceph.conf_path), "--name", "client.ringstone")
    lab.hosts["b"].run(*rbd, "create", "--size", "8M", "rbd/of-b")
    assert "of-b" in lab.hosts["a"].run(*rbd, "ls").split()
    lab.ceph.rbd("rm", "rbd/of-b")


def test_a_hosts_gateway_is_killed_stopped_and_goes_on(lab: Lab) -> None:
    host = lab.hosts["a"]
    former = host.gateway.pid
    host.kill()
    host.start()
    assert host.gateway.pid != former
    host.pause()
    host.resume()
    with host.client() as client:
        assert client.info().pid == host.gateway.pid
    assert host.stop() == 0
    host.start()


# What is left.


@contextmanager
def command_line_lab() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], list[int]]]:
    """A small `ringstone lab`, what it says about itself, and the processes it has started."""
    command = [*RINGSTONE, "lab", "--hosts", "1", "--osds", "1", "--copies", "1", "--json"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], _EVENT_SECONDS)
            assert ready, "the lab did not start"
            described = json.loads(process.stdout.readline())
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield process, described, [int(pid) for pid in children]
        finally:
            process.kill()


def gone(pid: int) -> bool:
    """Waits for the end of a process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], _EVENT_SECONDS)[0])
    finally:
        os.close(pidfd)


@pytest.mark.skipif(os.geteuid() != 0, reason="Network namespaces take root.")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(number: signal.Signals) -> None:
    """By SIGTERM it removes all of it; after SIGKILL its daemons end by themselves, and the next run removes the
    rest."""
    with command_line_lab() as (process, described, pids):
        host = described["hosts"][0]
        namespace, folder = Path("/run/netns") / host["namespace"], Path(described["folder"])
        # Monitor, manager, OSD, etcd, gateway, our manager, and the process that asks Ceph.
        assert len(pids) == 7
        assert host["pid"] in pids
        assert namespace.exists()
        process.send_signal(number)
        status = process.wait(_EVENT_SECONDS)
    assert status == (0 if number == signal.SIGTERM else -number)
    assert all(gone(pid) for pid in pids)
    if number == signal.SIGKILL:
        assert folder.exists()
        folders.remove_remains()
        network.remove_remains()
    assert not folder.exists()
    assert not namespace.exists()
    assert not list(Path("/sys/class/net").glob(f"rs{process.pid}n*"))
    mounts = Path("/proc/mounts").read_text()
    assert str(folder) not in mounts
    assert namespace.name not in mounts
