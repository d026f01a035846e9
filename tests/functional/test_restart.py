"""What comes back after the gateway, or the host, has stopped: by itself, in order, and told where it is not
whole."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ringstone.errors import FailedError
from ringstone.models import Attachment
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import wait_until

MIB = 1 << 20


def connects(attachment: Attachment) -> bool:
    with socket.socket(socket.AF_UNIX) as frontend:
        return frontend.connect_ex(attachment.socket) == 0


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_pools_volumes_and_attachments_come_back(gateway: GatewayProcess, how: str) -> None:
    gateway.serve("a", kind="memory", queues=3)
    gateway.serve("b", kind="file", block_size=4096, read_only=True)
    with gateway.client() as client:
        client.create_volume("c", pool="file", size=MIB)
        before = client.pools(), client.volumes()
        memory = Path(client.pool("memory").path or "") / "a.raw"
    with memory.open("r+b") as file:
        file.write(b"kept")
    if how == "stop":
        gateway.stop()
        assert not gateway.socket.exists()
    else:
        gateway.kill()
    gateway.start()
    with gateway.client() as client:
        pools = [pool.model_copy(update={"free": None}) for pool in client.pools()]
        assert pools == [pool.model_copy(update={"free": None}) for pool in before[0]]
        assert client.volumes() == before[1]
        assert all(connects(attachment) for attachment in client.attachments())
        assert client.health().status == "ok"
    assert memory.read_bytes()[:4] == b"kept"


def test_sockets_come_back_after_a_restart_of_the_host(gateway: GatewayProcess) -> None:
    """Everything on tmpfs is gone: /run with the sockets, and the memory pool's files."""
    gateway.serve("kept", kind="file")
    gateway.serve("lost", kind="memory")
    gateway.kill()
    shutil.rmtree(gateway.run_dir)
    shutil.rmtree(gateway.memory / "memory")
    (gateway.state_dir / "boot").write_text("of the boot before")
    gateway.start()
    with gateway.client() as client:
        assert all(connects(attachment) for attachment in client.attachments())
        assert [(event.level, event.volume) for event in client.events() if event.level != "info"] == [
            ("warning", "lost")
        ]
    assert "content of volume 'lost' is gone" in gateway.log()


def test_a_missing_backing_fails_its_volume_and_no_other(gateway: GatewayProcess) -> None:
    gateway.serve("good", kind="file")
    gateway.serve("bad", kind="file")
    backing = gateway.state_dir / "pools/file/bad.raw"
    gateway.stop()
    backing.rename(gateway.root / "away.raw")
    gateway.start()
    with gateway.client() as client:
        bad, good = client.volumes()
        assert (bad.state, good.state) == ("failed", "ready")
        assert bad.attachment is not None
        assert good.attachment is not None
        assert (bad.attachment.state, good.attachment.state) == ("failed", "listening")
        assert str(backing) in (bad.reason or "")
        assert str(backing) in (bad.attachment.reason or "")
        with pytest.raises(FailedError):
            client.attach("bad")
        (gateway.root / "away.raw").rename(backing)
        assert client.attach("bad").state == "listening"
        assert client.health().status == "ok"


def test_a_backing_that_a_dying_process_holds_is_served_when_it_has_gone(gateway: GatewayProcess) -> None:
    """After SIGKILL the kernel keeps the dead process's locks until its last I/O is done. The gateway that came
    after it found the backing in use and left the volume failed for good."""
    gateway.serve("other", kind="file")
    held = gateway.serve("held", kind="file")
    backing = gateway.state_dir / "pools/file/held.raw"
    gateway.kill()
    # Stands in for the dead process: the same kind of lock, given back when it ends.
    code = (
        "import fcntl, struct, sys; file = open(sys.argv[1], 'r+b')\n"
        "fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack('hhlli4x', fcntl.F_WRLCK, 0, 0, 0, 0))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(backing)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        gateway.start()
        with gateway.client() as client:
            states = {one.volume: one.state for one in client.attachments()}
        assert states == {"held": "failed", "other": "listening"}
        assert "trying again for up to 30 s" in gateway.log()
        holder.kill()
    gateway.wait_for("the volume to be served", lambda client: client.health().status == "ok")
    assert connects(held)
    assert "s of waiting for its backing" in gateway.log()


def test_an_unmounted_pool_fails_and_is_not_filled(gateway: GatewayProcess) -> None:
    disk = gateway.root / "disk"
    disk.mkdir()
    gateway.cli("pool", "create", "p", "--type", "file", "--path", str(disk))
    gateway.cli("volume", "create", "v", "--pool", "p", "--size", "1M")
    gateway.stop()
    disk.rename(gateway.root / "unmounted")
    gateway.start()
    with gateway.client() as client:
        assert (client.pool("p").state, client.volume("v").state) == ("failed", "failed")
    assert gateway.cli("volume", "create", "w", "--pool", "p", "--size", "1M", check=False).returncode == 8
    assert not disk.exists()


def test_a_creation_cut_off_by_a_crash_leaves_nothing(gateway: GatewayProcess) -> None:
    """A gateway that died after making the file, before the volume was ready: its row is in state
    `creating`."""
    gateway.serve("whole", kind="file")
    with gateway.client() as client:
        client.create_volume("half", pool="file", size=MIB)
    gateway.kill()
    database = sqlite3.connect(gateway.state_dir / "ringstone.db")
    database.execute("UPDATE volumes SET state = 'creating' WHERE name = 'half'")
    database.commit()
    database.close()
    gateway.start()
    with gateway.client() as client:
        assert [volume.name for volume in client.volumes()] == ["whole"]
    assert [path.name for path in (gateway.state_dir / "pools/file").iterdir()] == ["whole.raw"]


def test_a_newer_state_is_refused_and_left_alone(gateway: GatewayProcess) -> None:
    gateway.stop()
    path = gateway.state_dir / "ringstone.db"
    database = sqlite3.connect(path)
    database.execute("UPDATE schema_version SET version = 1000")
    database.commit()
    database.close()
    done = gateway.run_to_end()
    assert done.returncode == 12
    assert "has schema 1000" in done.stderr
    assert not gateway.socket.exists()


def test_a_second_gateway_is_refused_and_the_first_goes_on(gateway: GatewayProcess) -> None:
    attachment = gateway.serve("v")
    done = gateway.run_to_end()
    assert done.returncode == 4
    assert f"process {gateway.pid}" in done.stderr
    assert connects(attachment)
    with gateway.client() as client:
        assert client.health().status == "ok"


def test_two_gateways_do_not_share_their_state(gateway: GatewayProcess) -> None:
    """With run directories of their own they would serve the same volumes to two guests."""
    done = gateway.run_to_end("--run-dir", str(gateway.root / "other"))
    assert done.returncode == 4
    assert str(gateway.state_dir) in done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU must be for everything")
def test_only_reactors_run_on_reactors_cores(gateway: GatewayProcess) -> None:
    gateway.serve("v")
    allowed: dict[str, set[str]] = {}
    for task in Path(f"/proc/{gateway.pid}/task").iterdir():
        status = dict(
            line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line
        )
        allowed.setdefault(status["Name"], set()).add(status["Cpus_allowed_list"])
    core = str(gateway.cores[0])
    assert [name for name, cpus in allowed.items() if core in cpus] == [f"reactor-{core}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_gateway_cleanly(gateway: GatewayProcess, number: signal.Signals) -> None:
    attachment = gateway.serve("v")
    gateway.stop(number)
    assert not connects(attachment)
    assert not gateway.socket.exists()
    assert gateway.log().splitlines()[-1].endswith("The gateway has stopped.")


def test_a_stop_while_the_api_is_not_up_yet_is_clean_too(gateway: GatewayProcess) -> None:
    """Volumes are served before the API is imported; a stop in between killed the process with its guests connected."""
    attachment = gateway.serve("v")
    gateway.kill()
    with subprocess.Popen(gateway.command(), env=gateway.environment(), stderr=subprocess.PIPE) as process:
        wait_until(lambda: connects(attachment), "the volume is served")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"The gateway has stopped." in said
    assert not Path(attachment.socket).exists()
    gateway.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_is_repeated_disturbs_no_stop(gateway: GatewayProcess, number: signal.Signals) -> None:
    """A second signal ended a gateway in the midst of its end: asyncio's loop had left, and the default disposition
    was back. It then counted as a crash, too."""
    attachment = gateway.serve("v")
    gateway.stop(number, insist=True)
    assert not Path(attachment.socket).exists()
    assert gateway.log().splitlines()[-1].endswith("The gateway has stopped.")


def test_an_open_request_does_not_hold_up_the_stop(gateway: GatewayProcess) -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(gateway.socket))
        idle.sendall(b"POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        gateway.stop()


def test_a_socket_that_is_no_socket_is_left_alone(gateway: GatewayProcess) -> None:
    gateway.stop()
    gateway.socket.write_text("precious")
    done = gateway.run_to_end()
    assert done.returncode == 4
    assert "is no socket" in done.stderr
    assert gateway.socket.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--cores", "4095"), 5, "may not use CPU 4095"),
        (("--idle-us", "-1"), 5, "idle_us"),
        (("--config", "/missing/gateway.toml"), 8, "/missing/gateway.toml"),
        (("--run-dir", "/proc/ringstone"), 8, "/proc/ringstone"),
        (("--run-dir", "/tmp/" + "x" * 110), 5, "longer than the 107 bytes"),
    ],
)
def test_a_gateway_that_cannot_start_says_why(
    gateway: GatewayProcess, arguments: tuple[str, ...], code: int, message: str
) -> None:
    gateway.stop()
    done = gateway.run_to_end(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_gateway_that_crashes_in_a_row_slows_itself_down_and_says_so(gateway: GatewayProcess) -> None:
    attachment = gateway.serve("v")
    for _ in range(5):
        gateway.kill()
        gateway.start()
        assert connects(attachment)
    warnings = [line for line in gateway.log().splitlines() if "times in a row" in line]
    assert [line[line.index("it waits") :].split(" before")[0] for line in warnings] == [
        "it waits 0.2 s",
        "it waits 0.4 s",
        "it waits 0.8 s",
    ]
    gateway.restart()
    gateway.kill()
    gateway.start()
    assert gateway.log().count("times in a row") == 3


def test_a_supervised_gateway_comes_back_after_a_crash_and_stops_when_told() -> None:
    with GatewayProcess("--supervise") as gateway:
        gateway.start()
        attachment = gateway.serve("v")
        with gateway.client() as client:
            first = client.info().pid
            assert first != gateway.pid
            os.kill(first, signal.SIGKILL)
        gateway.wait_ready()
        with gateway.client() as client:
            assert client.info().pid not in (first, gateway.pid)
        assert connects(attachment)
        gateway.stop()
        assert not connects(attachment)
        assert "ended by SIGKILL without being asked" in gateway.log()


def test_signs_of_life_come_from_reactors_that_turn() -> None:
    with GatewayProcess(watchdog_ms=20) as gateway:
        gateway.start()
        for _ in range(3):
            gateway.wait_sign_of_life()
