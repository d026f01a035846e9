"""The Debian packages under a real dpkg and systemd: installed, upgraded under load, refused, removed and purged."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.framework.installed import GATEWAY, MANAGER, ROOT, SUITES, sound
from tests.framework.packages import Packaged, packaged

CONFIG = "/etc/ringstone/gateway.toml"
STATE = "/var/lib/ringstone"
# From the unit; `systemctl show` prints what is in force, whatever the unit's file says.
CONFINED = {
    "CapabilityBoundingSet": "cap_dac_override",
    "DevicePolicy": "closed",
    "MemoryDenyWriteExecute": "yes",
    "NoNewPrivileges": "yes",
    "PrivateTmp": "yes",
    "ProtectHome": "yes",
    "ProtectSystem": "strict",
    "RestrictNamespaces": "yes",
}


# The Debian with this machine's Python.
OWN = SUITES.get(sys.version_info[:2], "trixie")


@pytest.mark.soak
@pytest.mark.parametrize("suite", SUITES.values())
def test_packages_install_upgrade_under_load_and_leave_only_data(suite: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("Making a Debian root file system takes root.")
    with packaged(suite, tmp_path) as system:
        before = system.files()
        system.dpkg(f"--install {system.first}/*.deb")
        what_a_first_installation_leaves_runs(system)

        socket = system.serve({"disk": {"type": "file"}})["disk"]
        with system.loaded(socket) as reports:
            a_newer_package_takes_over(system)
            what_is_refused_is_told_and_stops_nothing(system)
        sound(reports[0])
        assert reports[0].reconnects == 0

        a_removed_package_keeps_its_configuration(system)
        said = system.dpkg("--purge ringstone-gateway ringstone-manager ringstone")
        assert f"{STATE} is kept" in said
        left = system.files() - before
        assert left == {STATE, f"{STATE}/pools", f"{STATE}/pools/disk", f"{STATE}/pools/disk/disk.raw"}
        assert before - system.files() == set()


@pytest.mark.soak
def test_a_manager_starts_once_it_is_configured_and_with_each_upgrade(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("Making a Debian root file system takes root.")
    settings = (ROOT / "deploy" / "manager.toml").read_text()
    settings = settings.replace("https://10.0.0.1:2379", "http://127.0.0.1:2379")
    settings = settings.replace(', "https://10.0.0.2:2379", "https://10.0.0.3:2379"', "")
    with packaged(OWN, tmp_path) as system:
        before = system.files()
        system.dpkg(f"--install {system.first}/ringstone_*.deb {system.first}/ringstone-manager_*.deb")
        assert system.property("ActiveState", MANAGER) == "inactive"

        system.shell("systemd-run --unit=etcd-test --property=Type=notify etcd --data-dir /run/etcd")
        token = "/etc/ringstone/manager-token"
        tokens = "/etc/ringstone/gateway-tokens"
        system.shell(f"umask 077 && mkdir -p {tokens} && head -c 32 /dev/urandom | base64 >{token}")
        system.shell(f"printf %s {shlex.quote(settings)} >/etc/ringstone/manager.toml")
        system.shell(f"systemctl start {MANAGER}")
        first = system.property("MainPID", MANAGER)
        ask = f"ringstone --manager http://127.0.0.1:7481 --token-file {token} host list --json"
        assert system.shell(ask) == "[]"

        system.dpkg(f"--install {system.newer}/ringstone_*.deb {system.newer}/ringstone-manager_*.deb")
        assert system.property("MainPID", MANAGER) not in (first, "0")
        assert system.shell(ask) == "[]"

        system.dpkg("--purge ringstone-manager ringstone")
        system.shell("systemctl stop etcd-test")
        assert system.files() - before == {"/etc/ringstone", token, tokens}


def what_a_first_installation_leaves_runs(system: Packaged) -> None:
    assert system.property("ActiveState") == "active"
    assert system.property("FragmentPath").endswith(f"/lib/systemd/system/{GATEWAY}")
    assert system.property("WatchdogUSec") == "10s"
    show = " ".join(f"--property {name}" for name in CONFINED)
    lines = system.shell(f"systemctl show {show} {GATEWAY}").splitlines()
    assert sorted(lines) == sorted(f"{name}={value}" for name, value in CONFINED.items())
    assert system.ringstone("status")["gateway"]["pid"] == int(system.property("MainPID"))
    assert "serves its API on /run/ringstone/gateway.sock" in system.journal()
    # Nobody could say for it where etcd is.
    assert system.property("UnitFileState", MANAGER) == "enabled"
    assert system.property("ActiveState", MANAGER) == "inactive"
    assert system.property("ConditionResult", MANAGER) == "no"


def a_newer_package_takes_over(system: Packaged) -> None:
    first = system.property("MainPID")
    said = system.dpkg(f"--install {system.newer}/*.deb")
    assert "could not take over" not in said
    status = system.ringstone("status")["gateway"]
    assert status["version"] == "99.0"
    assert status["upgrade"]["volumes"] == 1
    assert str(status["pid"]) == system.property("MainPID") != first
    assert system.property("NRestarts") == "0"


def what_is_refused_is_told_and_stops_nothing(system: Packaged) -> None:
    """A package must not have guests wait because of a setting that nobody has tried yet."""
    running = system.property("MainPID")
    system.shell(f"cp {CONFIG} /run/kept.toml && echo 'no_such_setting = 1' >>{CONFIG}")
    said = system.dpkg(f"--install {system.newer}/ringstone-gateway_*.deb")
    assert "could not take over" in said
    assert "no_such_setting" in said
    assert system.property("MainPID") == running
    assert system.property("ActiveState") == "active"
    system.shell(f"mv /run/kept.toml {CONFIG}")


def a_removed_package_keeps_its_configuration(system: Packaged) -> None:
    system.dpkg("--remove ringstone-gateway")
    assert system.property("ActiveState") == "inactive"
    assert system.shell(f"ls {CONFIG} {STATE}/ringstone.db").split() == [CONFIG, f"{STATE}/ringstone.db"]
