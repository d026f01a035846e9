"""A gateway that is replaced by a new process under load: nobody reconnects, nothing is lost, and where the new one
fails the old one goes on."""

import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import time

import pytest

from tests.framework.gateway import GatewayFailedError, GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.pattern import RunningPattern, running_pattern


def unnoticed(load: RunningPattern) -> None:
    report = load.report
    assert report.passed, report.findings
    assert report.reconnects == 0
    assert report.missed_calls == 0
    assert report.blocks_checked > 0


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        *itertools.product(["memory", "file"], [False, True]),
        ("store", True),
        ("sealed", True),
        pytest.param("store", False, marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_guests_do_not_notice(gateway: GatewayProcess, kind: str, packed: bool, rounds: int) -> None:
    volume = gateway.serve("disk", kind=kind, queues=4)
    with running_pattern(volume.socket, packed=packed) as load:
        for _ in range(rounds):
            before = gateway.pid
            report = gateway.upgrade()
            assert gateway.pid != before
            assert (report["volumes"], report["from_version"]) == (1, report["to_version"])
            assert report["stall_ms"] > 0
    unnoticed(load)


def test_the_new_process_is_a_gateway_like_any_other(gateway: GatewayProcess) -> None:
    """It has the API, the locks, the log and the attachments, and can be told everything."""
    gateway.serve("kept", queues=2)
    gateway.upgrade()
    with gateway.client() as client:
        assert client.info().upgrade is not None
        assert client.health().status == "ok"
        gateway.serve("new", queues=1)
        assert [attachment.volume for attachment in client.attachments()] == ["kept", "new"]
        client.resize_volume("kept", 128 << 20)
    refused = gateway.run_to_end()
    assert refused.returncode == 4
    assert f"process {gateway.pid}" in refused.stderr
    assert "Took 1 volumes over" in gateway.log()
    gateway.restart()
    with gateway.client() as client:
        assert client.info().upgrade is None
        assert {attachment.state for attachment in client.attachments()} == {"listening"}


def goes_on(gateway: GatewayProcess, pid: int) -> None:
    with gateway.client() as client:
        assert client.info().pid == pid
        assert client.attachments()[0].state == "running"


def test_a_new_process_that_cannot_start_changes_nothing(gateway: GatewayProcess) -> None:
    volume = gateway.serve("disk", queues=4)
    pid = gateway.pid
    with running_pattern(volume.socket) as load:
        cores = gateway.run_to_end("--takeover", "--cores", "4095")
        assert cores.returncode == 5
        with sqlite3.connect(gateway.state_dir / "ringstone.db") as database:
            (schema,) = database.execute("SELECT version FROM schema_version").fetchone()
            database.execute("UPDATE schema_version SET version = 1000")
        database.close()
        with pytest.raises(GatewayFailedError, match="has schema 1000") as refused:
            gateway.upgrade()
        assert "goes on" in str(refused.value)
        with sqlite3.connect(gateway.state_dir / "ringstone.db") as database:
            database.execute("UPDATE schema_version SET version = ?", (schema,))
        database.close()
        goes_on(gateway, pid)
        gateway.upgrade()
    unnoticed(load)


def test_strangers_at_the_socket_change_nothing(gateway: GatewayProcess) -> None:
    volume = gateway.serve("disk", queues=4)
    pid = gateway.pid
    with running_pattern(volume.socket) as load:
        for words in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"{}\n",
            b'{"version": "9"}\nRSHO\1\0\0\0\2\0\0\0\0\0\0\0{}',
        ):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(gateway.run_dir / "handover.sock"))
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                # A reset where it hung up with words of ours unread.
                with contextlib.suppress(ConnectionResetError):
                    while stranger.recv(4096):
                        pass
        goes_on(gateway, pid)
        assert gateway.log().count("No upgrade: ") == 4
        gateway.upgrade()
    unnoticed(load)


def test_without_a_gateway_there_is_nothing_to_take_over(gateway: GatewayProcess) -> None:
    gateway.stop()
    done = gateway.run_to_end("--takeover")
    assert done.returncode == 3
    assert "start one without --takeover" in done.stderr


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_a_new_process_killed_at_any_moment_loses_nothing(gateway: GatewayProcess, rounds: int) -> None:
    """Before the word to go the old one goes on. In the moment after it neither has the volumes, and the old one
    ends so that whoever watches over it starts a fresh one; that finds in the in-flight regions where to go on."""
    volume = gateway.serve("disk", queues=4)
    outcomes = {"went on": 0, "started anew": 0}

    def successor() -> subprocess.Popen[bytes]:
        command = [*gateway.command(), "--takeover"]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=gateway.environment())

    with running_pattern(volume.socket) as load:
        begun = time.monotonic()
        first = successor()
        gateway.follow(first.pid)
        whole = time.monotonic() - begun
        for number in range(rounds):
            new = successor()
            # Until it has begun to serve, and a little longer.
            time.sleep(whole * 1.1 * (number + 0.5) / rounds)
            new.kill()
            new.wait()
            outcomes[_outcome(gateway)] += 1
            gateway.wait_for("the load to run on", lambda c: c.attachments()[0].state == "running")
        if first.poll() is None:
            # It is a child of this test, and its end is to be told from that of a stranger's.
            gateway.stop()
            gateway.start()
        first.wait()
    assert load.report.passed, load.report.findings
    assert outcomes["went on"] > 0, outcomes


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_an_old_process_killed_at_any_moment_loses_nothing(gateway: GatewayProcess, rounds: int) -> None:
    """Before the word to go nobody serves then, and the next start goes on; behind it the new one does."""
    volume = gateway.serve("disk", queues=4)
    outcomes = {"serves": 0, "ended": 0}
    successors = []

    def successor() -> subprocess.Popen[bytes]:
        command = [*gateway.command(), "--takeover"]
        successors.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, env=gateway.environment()))
        return successors[-1]

    with running_pattern(volume.socket) as load:
        begun = time.monotonic()
        gateway.follow(successor().pid)
        whole = time.monotonic() - begun
        for number in range(rounds):
            new = successor()
            time.sleep(whole * 1.1 * (number + 0.5) / rounds)
            serves = gateway.kill_beside(new)
            outcomes["serves" if serves else "ended"] += 1
            if not serves:
                gateway.forget_starts()
                gateway.start()
            gateway.wait_for("the load to run on", lambda c: c.attachments()[0].state == "running")
        gateway.kill()
        for one in successors:
            one.wait()
        gateway.forget_starts()
        gateway.start()
        gateway.wait_for("the load to run on", lambda c: c.attachments()[0].state == "running")
    assert load.report.passed, load.report.findings
    assert outcomes["ended"] > 0, outcomes


def _outcome(gateway: GatewayProcess) -> str:
    """What became of the gateway; one runs afterwards in any case."""
    if not gateway.ends(within_s=1):
        return "went on"
    gateway.start()
    return "started anew"


def test_an_upgrade_tells_of_itself(gateway: GatewayProcess) -> None:
    gateway.serve("disk")
    done = gateway.cli("gateway", "upgrade")
    assert "1 volumes, whose requests paused for" in done.stdout
    with gateway.client() as client:
        gateway.follow(client.info().pid)
    status = json.loads(gateway.cli("status", "--json").stdout)
    assert status["gateway"]["upgrade"]["volumes"] == 1


def served_by(gateway: GatewayProcess) -> int:
    with gateway.client() as client:
        return client.info().pid


def test_a_supervisor_follows_its_gateway_through_upgrades() -> None:
    """SIGHUP from `ringstone gateway upgrade`; the supervisor stays, and watches over the new process from then on."""
    with GatewayProcess("--supervise") as gateway:
        gateway.start()
        volume = gateway.serve("disk", queues=2)
        pids: list[int] = []
        with running_pattern(volume.socket, queues=2) as load:
            for _ in range(2):
                pids.append(served_by(gateway))
                done = json.loads(gateway.cli("gateway", "upgrade", "--json").stdout)
                assert done["volumes"] == 1
                gateway.wait_ready()
            pids.append(served_by(gateway))
            os.kill(pids[-1], signal.SIGKILL)
            gateway.wait_ready()
            pids.append(served_by(gateway))
            assert len({*pids, gateway.pid}) == 5
            gateway.wait_for("the load to run on", lambda c: c.attachments()[0].state == "running")
        assert load.report.passed, load.report.findings
        assert load.report.reconnects == 1
        gateway.stop()
