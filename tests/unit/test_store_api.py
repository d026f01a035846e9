"""Store pools as an operator meets them: the command line and the client, through a manager and a gateway's API."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ringstone import models
from ringstone.cli.app import app
from ringstone.cli.context import CliContext
from ringstone.client import RemoteClient
from ringstone.errors import (
    BusyError,
    ExistsError,
    FailedError,
    InvalidError,
    NotFoundError,
    RingstoneError,
    UnsupportedError,
)
from tests.framework.manager import Cluster, cluster
from tests.unit.store_fake import FakeStore, failure, stores

__all__ = ["cluster", "stores"]

MIB = 1 << 20


@pytest.fixture
def client(cluster: Cluster, stores: type[FakeStore]) -> RemoteClient:
    return cluster.client()


@pytest.fixture
def _commands(cluster: Cluster, stores: type[FakeStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """They talk to the cluster's manager."""
    monkeypatch.setattr(CliContext, "client", lambda cli, timeout=None: cluster.client())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def made(client: RemoteClient, *volumes: str) -> models.Pool:
    options = models.StoreOptions(size=64 * MIB)
    pool = client.create_pool(models.PoolCreate(name="fast", type="store", host="a", store=options))
    for name in volumes:
        client.create_volume(name, pool="fast", size=16 * MIB)
    return pool


def written(pool: models.Pool, volume: str, own: int) -> None:
    assert pool.path is not None
    FakeStore(pool.path).written(volume, own)


def test_a_pool_tells_its_space(client: RemoteClient) -> None:
    pool = made(client, "v")
    written(pool, "v", 28 * MIB)
    found = client.pool("fast")
    assert (found.total, found.free, found.provisioned) == (32 * MIB, 4 * MIB, 16 * MIB)
    assert found.space == models.Space(
        size=64 * MIB,
        capacity=32 * MIB,
        used=28 * MIB,
        free=4 * MIB,
        promised=16 * MIB,
        promised_at_most=320 * MIB,
        reclaiming=0,
    )
    grown = client.grow_pool("fast", 96 * MIB)
    assert grown.space is not None
    assert grown.space.capacity == 48 * MIB
    assert client.pool("shared").space is None


def test_a_warning_is_among_the_gateway_s_events(cluster: Cluster, client: RemoteClient) -> None:
    pool = made(client, "v")
    written(pool, "v", 28 * MIB)
    for _ in range(2):
        client.pool("fast")
    events = cluster.hosts["a"].service.events.latest(10)
    assert [one.message[:24] for one in events if one.level == "warning"] == ["Pool fast is 87 % full: "]


def test_snapshots_clones_and_differences(client: RemoteClient) -> None:
    pool = made(client, "v", "w")
    client.attach("v")
    assert client.create_snapshot("v", "monday", also=["w"]).own == 4096
    assert [one.name for one in client.snapshots("w")] == ["monday"]
    with pytest.raises(ExistsError):
        client.create_snapshot("v", "monday")
    assert client.clone_volume("v", "now").size == 16 * MIB
    client.clone_snapshot("v", "monday", "then")
    written(pool, "v", MIB)
    assert client.volume("v").allocated == MIB
    assert client.volume("v").shared == 4096
    found = client.diff("v", since="monday")
    assert (found.since, found.until, found.changed, found.ranges) == ("monday", None, MIB, [(0, MIB)])
    client.flatten("then")
    with pytest.raises(InvalidError, match="nothing to copy"):
        client.flatten("then")


def test_what_other_pools_have_not_is_told(cluster: Cluster, client: RemoteClient) -> None:
    client.create_volume("plain", pool="shared", size=MIB)
    with pytest.raises(UnsupportedError, match="store or rbd pool"):
        client.diff("plain")
    cluster.local_pool("a")
    with pytest.raises(UnsupportedError, match="only store pools"):
        client.grow_pool("local")


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ({"extent": 12345}, "use 16K"),
        ({"extent": 65536.5}, "extent"),
        ({"overcommit": 0}, "within 1"),
        ({"overcommit": "x"}, "overcommit"),
        ({"size": "64M"}, "size"),
        ({"sise": 1}, "sise"),
    ],
)
def test_bad_options_are_named(client: RemoteClient, store: dict[str, object], said: str) -> None:
    body = {"name": "fast", "type": "store", "host": "a", "store": {"size": 64 * MIB} | store}
    with pytest.raises(RingstoneError, match=said) as raised:
        client._call(models.Pool, "POST", "/pools", body=body)
    assert raised.value.code == "invalid"
    assert "fast" not in [pool.name for pool in client.pools()]


def test_options_of_a_store_are_for_stores(client: RemoteClient) -> None:
    options = models.StoreOptions(size=MIB)
    with pytest.raises(InvalidError, match="Only store pools"):
        client.create_pool(models.PoolCreate(name="plain", type="file", host="a", store=options))


def test_a_pool_whose_drive_is_gone_is_failed_and_others_are_shown(client: RemoteClient) -> None:
    pool = made(client, "v")
    client.create_volume("plain", pool="shared", size=MIB)
    assert pool.path is not None
    Path(pool.path).unlink()
    found = client.pool("fast")
    assert (found.state, found.space, found.free) == ("failed", None, None)
    assert "is not there" in str(found.reason)
    states = {volume.name: (volume.state, volume.allocated, volume.shared) for volume in client.volumes()}
    assert states["v"] == ("failed", None, None)
    assert states["plain"][0] == "ready"


# the command line


@pytest.mark.usefixtures("_commands")
def test_an_operator_s_day(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    make = ("pool", "create", "fast", "--type", "store", "--host", "a", "--path", str(drive))
    assert "needs a size" in str(run(*make).exception)
    sized = (*make, "--size", "64M", "--extent", "16K", "--overcommit", "4")
    assert said(*sized) == f"Made store pool fast on {drive}, with room for 32 MiB.\n"
    shown = said("pool", "show", "fast")
    for row in ("drive", "64 MiB", "used", "0 B (0.0 %)", "reclaiming", "promised", "at most 128 MiB"):
        assert row in shown
    for name in ("web", "db"):
        said("volume", "create", name, "--pool", "fast", "--size", "16M")
    assert said("snapshot", "create", "web", "monday", "--also", "db") == (
        "Made snapshot monday of volumes web, db.\n"
    )
    assert "4 KiB" in said("snapshot", "list", "db")
    assert said("volume", "clone", "web", "web-2") == "Made volume web-2, 16 MiB, of web.\n"
    assert said("snapshot", "diff", "web", "--from", "monday") == "0 0\n"
    assert json.loads(said("--json", "snapshot", "diff", "web", "--to", "monday"))["ranges"] == [[0, 0]]
    assert "shared" in said("volume", "show", "web")
    assert said("pool", "grow", "fast", "--size", "96M") == (
        f"Pool fast uses all of {drive} and has room for 48 MiB.\n"
    )


def test_a_check_tells_what_is_there_and_ends_with_11_on_faults(
    tmp_path: Path, stores: type[FakeStore]
) -> None:
    drive = tmp_path / "drive"
    uuid = FakeStore.format(str(drive), size=64 * MIB)
    printed = said("store", "check", str(drive))
    assert uuid in printed
    assert "64 MiB in extents of 64 KiB" in printed
    assert "note: 3 blocks of the journal" in printed
    FakeStore.failures["check"] = failure("failed", "damaged")
    result = run("store", "check", str(drive))
    assert result.exit_code == 11
    assert "fault: slot 7 has no owner" in result.stdout
    result = run("--json", "store", "check", str(drive))
    assert result.exit_code == 11
    assert json.loads(result.stdout)["faults"] == ["slot 7 has no owner"]


def test_a_check_of_what_a_gateway_has_is_refused(tmp_path: Path, stores: type[FakeStore]) -> None:
    drive = str(tmp_path / "drive")
    FakeStore.format(drive, size=64 * MIB)
    FakeStore(drive)
    assert isinstance(run("store", "check", drive).exception, BusyError)


@pytest.mark.usefixtures("_commands")
def test_a_pool_has_a_key_and_gets_another(client: RemoteClient, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(path.name.encode().ljust(32, b"."))
        path.chmod(0o600)
    make = ("pool", "create", "safe", "--type", "store", "--host", "a", "--size", "64M")
    refused = run(*make, "--key-file", str(old), "--key-command", "vault")
    assert isinstance(refused.exception, InvalidError)
    said(*make, "--key-file", str(old))
    assert "encrypted" not in said("volume", "create", "v", "--pool", "safe", "--size", "16M", "--encryption")
    assert client.volume("v").encryption
    assert f"file {old}" in said("pool", "show", "safe")
    assert f"is file {new} now" in said("pool", "rekey", "safe", "--key-file", str(new))
    assert client.pool("safe").key == f"file {new}"
    nothing = run("pool", "rekey", "safe")
    assert isinstance(nothing.exception, InvalidError)
    with pytest.raises(UnsupportedError, match="encrypts nothing"):
        client.rekey_pool("shared", models.PoolRekey(key_file=str(new)))


@pytest.mark.usefixtures("_commands")
def test_a_deletion_is_watched_and_taken_back(client: RemoteClient) -> None:
    made(client, "v", "w")
    for name in ("monday", "tuesday"):
        client.create_snapshot("v", name)
    client.clone_snapshot("v", "tuesday", "copy")
    said_free = [line.split() for line in said("snapshot", "reclaimable", "v").splitlines()[1:]]
    assert said_free == [["monday", "8", "KiB"], ["tuesday", "has", "clones"]]
    assert said("snapshot", "deletions", "v").splitlines()[1:] == []
    said("snapshot", "delete", "v", "monday")
    [row] = said("snapshot", "deletions", "v").splitlines()[1:]
    assert row.split() == ["monday", "4", "KiB", "1", "KiB", "75", "%"]
    assert "Kept snapshot monday" in said("snapshot", "keep", "v", "monday")
    assert [one.name for one in client.snapshots("v")] == ["tuesday", "monday"]
    assert client.deletions("v") == []
    with pytest.raises(NotFoundError, match="no snapshot"):
        client.keep_snapshot("v", "monday")
    client.create_pool(models.PoolCreate(name="plain", type="null", host="a"))
    client.create_volume("plain", pool="plain", size=MIB)
    for call in (client.deletions, client.reclaimable):
        with pytest.raises(UnsupportedError, match="has no snapshots"):
            call("plain")


def test_only_what_loses_nothing_is_mended_and_only_after_a_yes(
    tmp_path: Path, stores: type[FakeStore]
) -> None:
    drive = tmp_path / "drive"
    content = FakeStore.drives[FakeStore.format(str(drive), size=64 * MIB)]
    check = ("store", "check", str(drive), "--quick", "--repair")
    assert said(*check).endswith("There is nothing to mend.\n")
    bad = "the superblock at byte 0 is bad; the one at byte 524288 is newer, and sound"
    content.bad_copies = [bad]
    shown = said("store", "check", str(drive), "--quick")
    assert f"mendable: {bad}" in shown
    assert "blocks     not read" in shown
    assert "256 read, 64 verified" in said("store", "check", str(drive))
    refused = CliRunner().invoke(app, [*check], input="n\n")
    assert (refused.exit_code, content.bad_copies) == (1, [bad])
    FakeStore.failures["check"] = failure("failed", "damaged")
    faulty = run(*check, "--yes")
    assert (faulty.exit_code, content.bad_copies) == (11, [bad])
    assert "Nothing was written, as there are faults" in faulty.stdout
    del FakeStore.failures["check"]
    assert said(*check, "--yes").endswith("1 copies were written anew.\n")
    assert content.bad_copies == []
    assert json.loads(said("--json", *check, "--yes"))["mended"] is False


@pytest.mark.usefixtures("_commands")
def test_a_scrub_is_begun_watched_and_cancelled(client: RemoteClient) -> None:
    pool = made(client, "v")
    assert pool.path is not None
    store = FakeStore(pool.path)
    assert "scrub" not in said("pool", "show", "fast")
    assert said("store", "scrub", "fast", "--cancel") == "Pool fast is not being scrubbed.\n"
    assert said("store", "scrub", "fast") == (
        "Scrub of pool fast: running: 0.0 % of 8 MiB, at most 64 MiB a second; 0 bad, 0 unreadable, 0 mended.\n"
    )
    store.goes_on(done=2 * MIB, bad=1)
    again = json.loads(said("--json", "store", "scrub", "fast", "--rate", "8M"))["scrub"]
    assert (again["state"], again["rate"], again["done"]) == ("running", 8 * MIB, 2 * MIB)
    assert "running: 25.0 % of 8 MiB, at most 8 MiB a second; 1 bad" in said("pool", "show", "fast")
    said("store", "scrub", "fast", "--cancel")
    found = client.pool("fast").scrub
    assert found is not None
    assert (found.state, found.ended_at.isoformat() if found.ended_at else None) == (
        "cancelled",
        "2023-11-14T22:14:20+00:00",
    )
    with pytest.raises(UnsupportedError, match="cannot be scrubbed"):
        client.scrub_pool("shared")
    with pytest.raises(UnsupportedError, match="cannot be scrubbed"):
        client.cancel_scrub("shared")
    assert run("store", "scrub", "fast", "--cancel", "--wait").exit_code == 2


@pytest.mark.usefixtures("_commands")
def test_who_waits_for_a_scrub_is_told_how_it_ended(
    client: RemoteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = made(client, "v")
    assert pool.path is not None
    store = FakeStore(pool.path)
    ends: list[dict[str, object]] = [
        {"done": 4 * MIB},
        {"state": "done", "ended_s": 1_700_000_100, "bad": 1, "faults": ["the block at byte 0 of volume v"]},
    ]
    monkeypatch.setattr("ringstone.cli.store.time.sleep", lambda seconds: store.goes_on(**ends.pop(0)))
    found = run("store", "scrub", "fast", "--wait")
    assert (found.exit_code, ends) == (11, [])
    assert "fault: the block at byte 0 of volume v\n" in found.stdout
    ends.append({"state": "stopped", "ended_s": 1_700_000_200})
    stopped = run("store", "scrub", "fast", "--wait")
    assert isinstance(stopped.exception, FailedError)
    assert "did not go through" in str(stopped.exception)
    ends.append({"state": "done", "ended_s": 1_700_000_300})
    assert run("store", "scrub", "fast", "--wait").exit_code == 0


def test_a_terminal_shows_how_far_a_check_is(
    tmp_path: Path, stores: type[FakeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = str(tmp_path / "drive")
    FakeStore.format(drive, size=64 * MIB)
    assert run("store", "check", drive).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "Reading blocks" in run("store", "check", drive).stderr
    assert "Reading blocks" not in run("store", "check", drive, "--quick").stderr
