"""The lab's parts that need no cluster."""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from ringstone.errors import UnsupportedError
from ringstone.lab import folders
from ringstone.lab.ceph_conf import CephSettings, configuration, first_keys, keyring_text
from ringstone.lab.host import cores_of
from ringstone.lab.network import Network
from ringstone.lab.process import Daemon, LabError, Notifications, free_ports, run


def sleeper(folder: Path) -> Daemon:
    return Daemon("sleeper", ["sh", "-c", "echo begun; exec sleep 1000"], logs=folder)


def test_a_daemon_is_paused_resumed_and_killed(tmp_path: Path) -> None:
    daemon = sleeper(tmp_path)
    daemon.start()
    pid = daemon.pid
    daemon.wait("spoke", lambda: "begun" in daemon.tail(), 30)
    daemon.pause()
    assert daemon.running()
    daemon.resume()
    daemon.kill()
    assert not daemon.running()
    assert not Path(f"/proc/{pid}").exists()
    daemon.kill()  # once more does no harm


def test_a_paused_daemon_can_be_terminated(tmp_path: Path) -> None:
    daemon = sleeper(tmp_path)
    daemon.start()
    daemon.pause()
    assert daemon.terminate(30) == -15
    assert daemon.terminate(30) is None


def test_a_daemon_is_not_started_twice(tmp_path: Path) -> None:
    daemon = sleeper(tmp_path)
    daemon.start()
    try:
        with pytest.raises(LabError, match="runs already"):
            daemon.start()
    finally:
        daemon.kill()


def test_what_a_daemon_said_is_in_the_error(tmp_path: Path) -> None:
    daemon = Daemon("sad", ["sh", "-c", "echo no keyring; exit 3"], logs=tmp_path)
    daemon.start()
    with pytest.raises(LabError, match=r"sad ended with 3 before it served.\n(.|\n)*no keyring"):
        daemon.wait("served", lambda: False, 30)


def test_a_variable_can_be_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "outside")
    command = ["sh", "-c", 'echo "given=${GIVEN-nothing}"; exec sleep 1000']
    daemon = Daemon("shell", command, logs=tmp_path, environment={"GIVEN": None})
    daemon.start()
    try:
        daemon.wait("spoke", lambda: "given=nothing" in daemon.tail(), 30)
    finally:
        daemon.kill()


def test_ready_is_told_from_ended(tmp_path: Path) -> None:
    say = "import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);"
    say += "s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])"
    notifications = Notifications(tmp_path / "notify")
    try:
        for code, ready in ((f"{say}; import time; time.sleep(1000)", True), ("pass", False)):
            daemon = Daemon("service", [sys.executable, "-c", code], logs=tmp_path)
            daemon.start(environment={"NOTIFY_SOCKET": str(notifications.path)})
            try:
                if ready:
                    notifications.wait_ready(daemon, 30)
                else:
                    with pytest.raises(LabError, match="ended before it was ready"):
                        notifications.wait_ready(daemon, 30)
            finally:
                daemon.kill()
    finally:
        notifications.close()


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    daemon = Daemon("none", ["ceph-none"], logs=tmp_path, package="ceph-none-package")
    with pytest.raises(UnsupportedError, match=r"ceph-none is missing.*ceph-none-package.*make lab-packages"):
        daemon.start()


def test_a_failed_command_is_quoted() -> None:
    with pytest.raises(LabError, match=r"`sh -c .*` ended with 4: broken"):
        run(["sh", "-c", "echo broken >&2; exit 4"])


def test_hosts_take_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnsupportedError, match="take root"):
        Network().start()


def test_ports_are_all_different() -> None:
    assert len(set(free_ports("127.0.0.1", 6))) == 6


def test_the_first_cpu_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [cores_of(index) for index in range(4)] == [[3], [2], [1], [3]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert cores_of(1) == [0]


def test_folders_of_the_dead_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MEMORY", tmp_path)
    with subprocess.Popen(["true"]) as ended:
        pass
    dead = tmp_path / f"ringstone-lab-{ended.pid}-abc"
    others = [tmp_path / f"ringstone-ceph-{os.getpid()}-abc", tmp_path / "ringstone-bench-abc"]
    for path in (dead, *others):
        path.mkdir()
    folders.remove_remains()
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_each_daemon_has_a_key() -> None:
    numbers = count()
    keys = first_keys(2, lambda: str(next(numbers)))
    assert set(keys) == {"mon.", "client.admin", "client.ringstone", "mgr.a", "osd.0", "osd.1"}
    assert len({key for key, _ in keys.values()}) == 6
    text = keyring_text({"client.ringstone": ("secret", {"osd": "profile rbd"})})
    assert text == '[client.ringstone]\n\tkey = secret\n\tcaps osd = "profile rbd"\n'


def test_the_configuration_says_what_was_asked_for(tmp_path: Path) -> None:
    settings = CephSettings(size=2, heartbeat_grace_s=11)
    text = configuration(tmp_path, "the-fsid", "10.0.0.1", [3300, 6789], settings)
    assert "mon_host = [v2:10.0.0.1:3300/0,v1:10.0.0.1:6789/0]" in text
    assert "osd_pool_default_size = 2\n" in text
    assert "osd_heartbeat_grace = 11\n" in text
