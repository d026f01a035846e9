"""The units of deploy/ under a real systemd: what they let Ringstone do, and what they do not."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.framework.installed import GATEWAY, MANAGER, PLACE, Installed, installed, sound

MIB = 1 << 20
DISK_BYTES = 64 * MIB
DISK = "/dev/disk/by-id/virtio-spare"
# What `systemd-analyze security` may find at most, in tenths. The gateway was at 72, and the manager at 39.
EXPOSURE = {GATEWAY: 30, MANAGER: 20}

PROBE = (Path(__file__).parent / "unit_probe.py").read_text()
# What a service of Ringstone's has no business with.
FORBIDDEN = {
    "change the clock",
    "change the host's name",
    "give a file below /etc to another user",
    "give a file to another user",
    "listen to the network's packets",
    "load a kernel module",
    "look into another process",
    "make a BPF map",
    "make a namespace",
    "make a set-user-id file",
    "make code at run time",
    "mount",
    "open a disk",
    "open the kernel's log",
    "read a home directory",
    "run in real time",
    "write below /etc",
    "write below /srv",
    "write below /usr",
    "write below /var",
}
# Sockets are given to QEMU's user, where the gateway may write.
ALLOWED = {GATEWAY: {"give a file to another user"}, MANAGER: set[str]()}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    if os.geteuid() != 0:
        pytest.skip("Making a Debian root file system takes root.")
    folder = tmp_path_factory.mktemp("units")
    disk = folder / "spare"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    with installed(folder, disks=[(disk, "spare")]) as guest:
        guest.shell(f"cat >/run/probe.py <<'END'\n{PROBE}\nEND")
        yield guest


@contextmanager
def running(system: Installed, unit: str = GATEWAY, *lines: str) -> Iterator[None]:
    """The unit started, with `lines` in a drop-in; stopped at the end, with nothing left of either."""
    with dropped_in(system, unit, *lines):
        try:
            system.shell(f"systemctl start {unit}")
            yield
        finally:
            system.shell(f"systemctl stop {unit}; systemctl reset-failed {unit}", check=False)
            if unit == GATEWAY:
                system.shell("rm -rf /var/lib/ringstone")


@contextmanager
def dropped_in(system: Installed, unit: str, *lines: str) -> Iterator[None]:
    try:
        if lines:
            system.drop_in(unit, *lines)
        yield
    finally:
        system.no_drop_in(unit)


def serve(system: Installed) -> str:
    """A volume on files below the state directory, which is called disk; its socket."""
    return system.serve({"disk": {"type": "file"}})["disk"]


def test_systemd_understands_every_line(system: Installed) -> None:
    """It ignores a setting that it does not know, and the service runs without."""
    # There are no manual pages in this guest.
    assert (
        system.guest.run(f"systemd-analyze verify --man=no {GATEWAY} {MANAGER} 2>&1", timeout_s=60).stdout
        == ""
    )


@pytest.mark.parametrize("unit", [GATEWAY, MANAGER])
def test_what_is_not_its_business_is_refused(system: Installed, unit: str) -> None:
    """The gateway's unit let it do most of what root may: it kept root's capabilities and system calls, and every disk
    of the host was open to it."""
    report = system.shell(f"systemd-analyze security --no-pager {unit}")
    print(report.splitlines()[-1])
    with dropped_in(
        system,
        unit,
        "Type=oneshot",
        "Restart=no",
        "ExecStart=",
        f"ExecStart={PLACE}/bin/python /run/probe.py",
        "[Unit]",
        "ConditionPathExists=",
    ):
        system.shell("touch /root/secret")
        system.shell(f"systemctl start {unit}")
        outcome = json.loads(system.journal(unit, "--identifier", "python").splitlines()[-1])
        system.shell(f"systemctl stop {unit}")
    assert set(outcome) == FORBIDDEN
    assert {what for what, answer in outcome.items() if answer == "done"} == ALLOWED[unit]
    system.shell(f"systemd-analyze security --no-pager --threshold={EXPOSURE[unit]} {unit}")


def test_the_probe_does_what_nobody_forbids(system: Installed) -> None:
    """Otherwise the test above would prove nothing."""
    outcome = json.loads(system.shell(f"{PLACE}/bin/python /run/probe.py"))
    assert {what for what, answer in outcome.items() if answer != "done"} == set()


def test_it_serves_volumes_of_every_kind_where_it_may(system: Installed) -> None:
    kinds: dict[str, dict[str, object]] = {
        "files": {"type": "file"},
        "elsewhere": {"type": "file", "path": "/srv/volumes"},
        "device": {"type": "file", "path": DISK},
        "memory": {"type": "memory"},
        "huge": {"type": "memory", "hugepages": True},
    }
    system.shell("mkdir -p /srv/volumes && echo 20 >/proc/sys/vm/nr_hugepages")
    device = system.shell(f"readlink -f {DISK}")
    try:
        with running(system, GATEWAY, "ReadWritePaths=/srv/volumes", f"DeviceAllow={device} rw"):
            for pool, socket in system.serve(kinds).items():
                report = system.verify(socket)
                assert report["passed"], (pool, report["findings"])
    finally:
        system.shell(
            "rm -rf /srv/volumes /dev/shm/ringstone-* /dev/hugepages/ringstone-*; echo 0 >/proc/sys/vm/nr_hugepages"
        )


def test_a_socket_is_given_to_qemus_user_and_taken_back(system: Installed) -> None:
    with running(system):
        socket = serve(system)
        system.shell("ringstone volume detach disk")
        system.shell("ringstone volume attach disk --socket-owner nobody --socket-group nogroup")
        assert system.shell(f"stat -c '%U %G %a' {socket}") == "nobody nogroup 660"
        system.shell(f"systemctl kill --signal KILL {GATEWAY} && systemctl start {GATEWAY}")
        assert system.shell(f"stat -c '%U %G %a' {socket}") == "nobody nogroup 660"
        report = system.verify(socket)
        assert report["passed"], report["findings"]
    # As a unit of a release before has it.
    with running(system, GATEWAY, "CapabilityBoundingSet=", "CapabilityBoundingSet=CAP_DAC_OVERRIDE"):
        serve(system)
        system.shell("ringstone volume detach disk")
        refusal = system.refusal("ringstone volume attach disk --socket-owner nobody")
        assert "CAP_CHOWN" in refusal
        assert system.shell(f"ls {socket}", check=False) == ""


def test_what_the_unit_does_not_allow_is_told_with_the_remedy(system: Installed) -> None:
    system.shell("mkdir -p /srv/volumes")
    command = f"{PLACE}/bin/ringstone gateway --socket-dirs /srv"
    with running(system, GATEWAY, "ExecStart=", f"ExecStart={command}"):
        device = system.refusal(f"ringstone pool create device --type file --path {DISK}")
        assert "DeviceAllow=" in device
        folder = system.refusal("ringstone pool create elsewhere --type file --path /srv/volumes")
        assert "ReadWritePaths=" in folder
        serve(system)
        system.shell("ringstone volume detach disk")
        socket = system.refusal("ringstone volume attach disk --at /srv/disk.sock")
        assert "ReadWritePaths=" in socket
        # Each is an answer of a gateway that goes on.
        assert system.property("NRestarts") == "0"


def test_it_is_started_again_and_replaced_under_load(system: Installed) -> None:
    """libvirt may give a socket to QEMU's user. Root without the right to pass over permissions could not tell then
    that nobody listens there any more, and the volume stayed away."""
    with running(system):
        socket = serve(system)
        with system.loaded(socket) as reports:
            system.shell(f"chown nobody {socket} && systemctl kill --signal KILL {GATEWAY}")
            # Waits until the new one is ready.
            system.shell(f"systemctl start {GATEWAY}")
            assert system.property("NRestarts") == "1"
            first = system.property("MainPID")
            system.shell(f"systemctl reload {GATEWAY}")
            assert system.property("MainPID") != first
            assert system.property("NRestarts") == "1"
        sound(reports[0])
        assert reports[0].reconnects >= 1
        assert system.ringstone("status")["gateway"]["upgrade"]["volumes"] == 1
        # The one that took over feeds the watchdog and says so where the first one did.
        fed = system.property("WatchdogTimestampMonotonic")
        system.shell(
            f'until [ "$(systemctl show -P WatchdogTimestampMonotonic {GATEWAY})" != {fed} ]; do sleep 0.2; done'
        )
        assert system.property("NRestarts") == "1"
        assert "serves its API on /run/ringstone/gateway.sock" in system.journal()
        assert system.property("Type") == "notify"
        assert system.property("ActiveState") == "active"


@pytest.mark.soak
def test_a_gateway_that_is_free_is_taken_over_by_a_confined_one(system: Installed) -> None:
    """As where a host gets the unit of a newer release: `systemctl reload` is enough, and no guest notices. It failed,
    as the command asked for the free process's working directory, which a confined one may not see."""
    free = ("CapabilityBoundingSet=~", "ProtectSystem=no", "DevicePolicy=auto", "SystemCallFilter=")
    with running(system, GATEWAY, *free):
        socket = serve(system)
        with system.loaded(socket) as reports:
            before = system.shell(capabilities(system))
            system.no_drop_in(GATEWAY)
            system.shell(f"systemctl reload {GATEWAY}")
            assert system.shell(capabilities(system)) != before
        sound(reports[0])
        assert reports[0].reconnects == 0


def capabilities(system: Installed) -> str:
    return f"grep CapBnd /proc/{system.property('MainPID')}/status"


def test_a_manager_serves_a_host(system: Installed) -> None:
    url = "http://127.0.0.1"
    gateway = f'host = "here"\netcd = ["{url}:2379"]\nlisten = "127.0.0.1:7480"\ntoken_file = "/etc/ringstone/token"'
    manager = f'etcd = ["{url}:2379"]\ntoken_file = "/etc/ringstone/token"\ngateway_token_file = "/etc/ringstone/token"'
    system.shell("umask 077 && head -c 32 /dev/urandom | base64 >/etc/ringstone/token")
    for name, settings in (("gateway", gateway), ("manager", manager)):
        text = f"[{name}]\n{settings}\n"
        system.shell(f"printf %s {shlex.quote(text)} >/etc/ringstone/{name}.toml")
    ask = f"--manager {url}:7481 --token-file /etc/ringstone/token"
    try:
        system.shell("systemd-run --unit=etcd-test --property=Type=notify etcd --data-dir /run/etcd")
        with running(system), running(system, MANAGER):
            assert system.property("ActiveState", MANAGER) == "active"
            hosts = json.loads(system.shell(f"ringstone {ask} host list --json"))
            assert [(host["name"], host["alive"]) for host in hosts] == [("here", True)]
            system.shell(f"ringstone {ask} pool create files --type file --host here")
            assert [pool["name"] for pool in system.ringstone("pool", "list")] == ["files"]
    finally:
        system.shell("systemctl stop etcd-test; rm -rf /run/etcd /etc/ringstone/*", check=False)


@pytest.mark.soak
def test_one_that_hangs_is_killed_by_its_watchdog_and_started_again(system: Installed) -> None:
    with running(system):
        socket = serve(system)
        with system.loaded(socket) as reports:
            system.shell(f"systemctl kill --signal STOP {GATEWAY}")
            system.shell(f'until [ "$(systemctl show -P NRestarts {GATEWAY})" = 1 ]; do sleep 0.5; done')
            system.shell(f"systemctl start {GATEWAY}")
        sound(reports[0])
        assert "Watchdog timeout" in system.journal()


@pytest.mark.soak
def test_kills_and_upgrades_in_turn_lose_nothing(system: Installed) -> None:
    with running(system):
        socket = serve(system)
        with system.loaded(socket) as reports:
            for number in range(10):
                system.shell(f"systemctl kill --signal KILL {GATEWAY}; systemctl start {GATEWAY}")
                assert system.property("NRestarts") == str(number + 1)
                system.shell(f"systemctl reload {GATEWAY}")
        sound(reports[0])
        assert reports[0].reconnects >= 10
