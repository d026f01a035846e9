"""A cluster of two hosts under two managers: volumes go from host to host, with nothing lost and never two owners."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.errors import (
    DeniedError,
    ExistsError,
    InvalidError,
    UnauthorizedError,
    UnreachableError,
)
from ringstone.lab.credentials import Credentials
from ringstone.lab.lab import GATEWAY_PORT, Lab
from tests.framework.gateway import RINGSTONE
from tests.framework.lab import wait_for
from tests.framework.load import script

MIB = 1 << 20
WRITE = {"op": "write", "offset": 8 * 4096, "len": 64 * 1024, "fill": {"seed": 7}}
READ = {"op": "read", "offset": 8 * 4096, "len": 64 * 1024}


def written(client: RemoteClient, volume: str, **how: Any) -> tuple[models.Attachment, str]:
    """A new volume with something in it, attached, and that something's checksum."""
    client.create_volume(volume, pool="ceph", size=64 * MIB)
    attachment = client.attach(volume, **how)
    return attachment, script(attachment.socket, [WRITE, READ])[-1]["crc32"]


def read(attachment: models.Attachment) -> str:
    found: str = script(attachment.socket, [READ])[-1]["crc32"]
    return found


def cli(lab: Lab, *arguments: str, options: list[str] | None = None) -> "subprocess.CompletedProcess[str]":
    given = lab.managers[0].command_line() if options is None else options
    return subprocess.run(
        [*RINGSTONE, *given, *arguments], capture_output=True, text=True, check=False, timeout=150
    )


def test_both_managers_show_the_same_hosts(lab: Lab, manager: RemoteClient) -> None:
    with lab.managers[1].client() as second:
        for client in (manager, second):
            hosts = {host.name: host for host in client.hosts()}
            assert set(hosts) == {"a", "b"}
            assert hosts["a"].addresses == [f"https://{lab.hosts['a'].address}:{GATEWAY_PORT}"]
            assert hosts["a"].id != hosts["b"].id
    assert [pool.state for pool in manager.pools()] == ["ready"]


def test_a_living_host_lets_go_of_a_volume_by_itself(lab: Lab, manager: RemoteClient) -> None:
    on_a, content = written(manager, "disk", host="a")
    shut_out = set(lab.ceph.blocklist())
    with pytest.raises(ExistsError, match="attached"):
        manager.attach("disk", host="b")
    on_b = manager.attach("disk", host="b", take_over=True)
    assert (on_b.host, on_b.epoch) == ("b", on_a.epoch + 1)
    assert read(on_b) == content
    # Nobody had to be shut out, so a's other volumes were not disturbed.
    assert set(lab.ceph.blocklist()) == shut_out
    with lab.hosts["a"].client() as at_a:
        assert at_a.attachment("disk").state == "elsewhere"
        wait_for("a to let go", lambda: "not served here" in at_a.events(volume="disk")[-1].message)
    assert not Path(on_a.socket).exists()


def test_snapshots_and_sizes_go_to_the_owner(manager: RemoteClient) -> None:
    attachment, content = written(manager, "disk", host="b")
    manager.create_snapshot("disk", "monday")
    script(attachment.socket, [WRITE | {"fill": {"seed": 8}}])
    assert manager.resize_volume("disk", 96 * MIB).size == 96 * MIB
    manager.detach("disk")
    manager.revert("disk", "monday")
    assert read(manager.attach("disk", host="a")) == content
    assert [one.name for one in manager.snapshots("disk")] == ["monday"]


def test_a_dead_hosts_volume_is_taken_over_once(lab: Lab, manager: RemoteClient) -> None:
    on_a, content = written(manager, "safe", host="a", ha=True)
    kept, _ = written(manager, "kept", host="a")
    lab.hosts["a"].kill()

    def served_on_b() -> models.Attachment | None:
        found = manager.attachment("safe")
        return found if (found.host, found.state) == ("b", "listening") else None

    on_b = wait_for("the failover", served_on_b)
    # Once, whichever of the two managers it was.
    assert (on_b.epoch, on_b.ha, on_b.queues) == (on_a.epoch + 1, True, on_a.queues)
    assert read(on_b) == content
    told = []
    for one in lab.managers:
        with one.client() as client:
            told += [
                event.message for event in client.events(volume="safe") if "took it over" in event.message
            ]
    assert len(told) == 1
    # What was not asked for stays, and one command takes it.
    there = manager.attachment("kept")
    assert (there.host, there.state) == ("a", "unreachable")
    assert there.reason is not None
    assert "is dead" in there.reason
    with pytest.raises(UnreachableError, match="--take-over"):
        manager.detach("kept")
    done = cli(lab, "volume", "attach", "kept", "--host", "b", "--take-over", "--json")
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["host"], json.loads(done.stdout)["epoch"]) == ("b", kept.epoch + 1)
    # Back again, a has nothing to say about either.
    lab.hosts["a"].forget_starts()
    lab.hosts["a"].start()
    wait_for("a", lambda: manager.host("a").alive)
    assert {one.host for one in manager.attachments()} == {"b"}
    assert read(manager.attachment("safe")) == content


def test_a_host_that_hangs_is_shown_and_stops_nobody(lab: Lab, manager: RemoteClient) -> None:
    written(manager, "disk", host="a")
    lab.hosts["a"].pause()
    try:
        shown = manager.attachment("disk")
        assert (shown.host, shown.state) == ("a", "unreachable")
        assert [volume.name for volume in manager.volumes()] == ["disk"]
        assert any("a" in reason for reason in manager.health().reasons)
        # The other one does what every host can.
        wait_for("a's lease to end", lambda: not manager.host("a").alive)
        manager.create_volume("other", pool="ceph", size=MIB)
    finally:
        lab.hosts["a"].resume()
    wait_for("a", lambda: manager.attachment("disk").state == "listening")


def test_a_pool_of_one_host_is_used_there(lab: Lab, manager: RemoteClient) -> None:
    path = str(lab.hosts["b"].folder / "memory")
    with pytest.raises(InvalidError, match="--host"):
        manager.create_pool(models.PoolCreate(name="fast", type="memory", path=path))
    assert manager.create_pool(models.PoolCreate(name="fast", type="memory", path=path, host="b")).host == "b"
    manager.create_volume("local", pool="fast", size=MIB)
    assert manager.attach("local").host == "b"
    with pytest.raises(InvalidError, match="is on host 'b'"):
        manager.attach("local", host="a", take_over=True)


def _without_free(table: str) -> str:
    """A table without what is free on this machine's own storage, which changes from one moment to the next."""
    return re.sub(r"\S+ [KMGT]iB(?= ready)", "FREE", " ".join(table.split()))


def test_the_commands_print_the_same_through_a_manager(lab: Lab, manager: RemoteClient) -> None:
    written(manager, "disk", host="a")
    for words in (["volume", "list"], ["pool", "list"]):
        through, direct = (
            cli(lab, *words, options=options) for options in (None, ["--socket", str(lab.hosts["a"].socket)])
        )
        assert through.returncode == 0, through.stderr
        assert _without_free(through.stdout) == _without_free(direct.stdout)
    hosts = cli(lab, "host", "list")
    assert [line.split()[:2] for line in hosts.stdout.splitlines()[1:]] == [["a", "alive"], ["b", "alive"]]
    assert "alive" in cli(lab, "status").stdout
    refused = cli(lab, "host", "remove", "a")
    assert (refused.returncode, "is alive" in refused.stderr) == (4, True)


def test_strangers_are_refused(lab: Lab, manager: RemoteClient, tmp_path: Path) -> None:
    gateway = f"https://{lab.hosts['a'].address}:{GATEWAY_PORT}"
    own, others = lab.credentials.gateway_token("a"), lab.credentials.gateway_token("b")
    for url in (lab.managers[0].url, gateway):
        # A host's token is for that host alone.
        for token in ("", "f" * 64, others):
            with (
                RemoteClient(url, token=token, ca=lab.credentials.ca) as client,
                pytest.raises(UnauthorizedError, match="token"),
            ):
                client.volumes()
        # Somebody else's authority, and none.
        other = Credentials(tmp_path / url.rpartition(":")[2])
        for ca in (other.ca, None):
            with (
                RemoteClient(url, token=lab.credentials.token, ca=ca) as client,
                pytest.raises(DeniedError, match="--ca"),
            ):
                client.volumes()
        with (
            RemoteClient(url.replace("https", "http"), token=lab.credentials.token) as client,
            pytest.raises(UnreachableError, match="https"),
        ):
            client.volumes()
    # A gateway's own calls are there too.
    with RemoteClient(gateway, token=own, ca=lab.credentials.ca) as client:
        assert client.info().pid == lab.hosts["a"].gateway.pid
