"""The gateway's logic over a real store and real pools, with an engine that fails on command: nothing is half
made."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone.errors import (
    BusyError,
    ExistsError,
    FailedError,
    InvalidError,
    NoDeviceError,
    NoSpaceError,
    NotFoundError,
    RingstoneError,
    StorageError,
    UnreachableError,
)
from ringstone.state import AttachmentRecord, PoolRecord, VolumeState
from tests.framework.service import Host
from tests.framework.service import host as host

MIB = 1 << 20


def interrupt() -> None:
    """As if the process died here: no error handling of the gateway may run after it."""
    raise KeyboardInterrupt


# pools


def test_a_pool_without_a_path_gets_one(host: Host) -> None:
    assert host.pool("file").path == str(host.root / "pools/p")
    assert (host.root / "pools/p").is_dir()
    assert host.pool("null", "n").path is None
    host.service.pools.delete("p")
    assert not (host.root / "pools/p").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "_x", "a/b", "a b", "a\n", "ä", "x" * 64, "a\0"])
def test_bad_names_are_refused(host: Host, name: str) -> None:
    host.pool()
    with pytest.raises(InvalidError, match="is not a pool name"):
        host.pool("null", name)
    with pytest.raises(InvalidError, match="is not a volume name"):
        host.service.volumes.create(name, "p", MIB, 512)
    with pytest.raises(InvalidError, match="is not a volume name"):
        host.service.attach(name)
    assert (len(host.store.pools()), host.store.volumes()) == (1, [])


@pytest.mark.parametrize("name", ["a", "0", "A.b-c_9", "x" * 63])
def test_good_names_are_taken(host: Host, name: str) -> None:
    host.pool("null", name)
    host.service.volumes.create(name, name, MIB, 512)


def test_pools_do_not_share_a_medium(host: Host) -> None:
    (host.root / "disk").mkdir()
    (host.root / "same").symlink_to(host.root / "disk")
    host.service.pools.create(PoolRecord("a", "file", str(host.root / "disk"), None, 1))
    with pytest.raises(ExistsError, match="belongs to pool 'a'"):
        host.service.pools.create(PoolRecord("b", "file", str(host.root / "same"), None, 1))
    assert (host.root / "disk").is_dir()


def test_pools_that_cannot_be_are_refused_and_leave_nothing(host: Host) -> None:
    host.pool("memory")
    cases: list[tuple[PoolRecord, type[RingstoneError]]] = [
        (PoolRecord("p", "null", None, None, 1), ExistsError),
        (PoolRecord("q", "tape", None, None, 1), InvalidError),
        (PoolRecord("q", "faulty", None, None, 1), InvalidError),
        (PoolRecord("q", "null", "/somewhere", None, 1), InvalidError),
        (PoolRecord("q", "file", "relative", None, 1), InvalidError),
        (PoolRecord("q", "file", str(host.root / "missing"), None, 1), NoDeviceError),
        (PoolRecord("q", "file", "/dev/ringstone-missing", None, 1), NoDeviceError),
        (PoolRecord("q", "memory", str(host.memory / "p"), None, 1), ExistsError),
    ]
    for record, error in cases:
        with pytest.raises(error):
            host.service.pools.create(record)
    with pytest.raises(InvalidError, match="Only memory pools"):
        host.service.pools.create(PoolRecord("q", "file", None, None, 1), hugepages=True)
    assert [pool.name for pool in host.store.pools()] == ["p"]
    assert (host.memory / "p").is_dir()
    assert not (host.root / "pools/q").exists()


def test_a_pool_with_volumes_stays(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    with pytest.raises(BusyError, match="still has volumes"):
        host.service.pools.delete("p")
    with pytest.raises(NotFoundError):
        host.service.pools.delete("q")
    assert host.files() == ["v.raw"]


# volumes


def test_a_volume_is_made_checked_by_the_engine_and_ready(host: Host) -> None:
    host.pool()
    made = host.service.volumes.create("v", "p", MIB, 4096)
    assert host.store.volume("v") == made
    assert (made.size, made.block_size, made.state) == (MIB, 4096, VolumeState.READY)
    assert host.engine.calls == ["open_volume v", "close_volume v"]
    assert host.engine.serials["v"] == made.serial
    assert host.files() == ["v.raw"]


@pytest.mark.parametrize(
    ("name", "pool", "size", "block_size", "error", "message"),
    [
        ("v", "q", MIB, 512, NotFoundError, "no pool 'q'"),
        ("taken", "p", MIB, 512, ExistsError, "'taken' exists already"),
        ("taken", "p", 1 << 50, 512, ExistsError, "'taken' exists already"),
        ("v", "p", 1000, 512, InvalidError, "use 512 or 1024 bytes"),
        ("v", "p", 511, 512, InvalidError, "use 512 bytes"),
        ("v", "p", 6144, 4096, InvalidError, "use 4096 or 8192 bytes"),
        ("v", "p", MIB, 1024, InvalidError, "use 512 or 4096"),
        ("v", "p", None, 512, InvalidError, "needs a size"),
        ("v", "p", 7 * MIB + 512, 512, NoSpaceError, "7 MiB left of 8 MiB"),
        ("foreign", "p", MIB, 512, ExistsError, "belongs to no volume"),
    ],
)
def test_volumes_that_cannot_be_are_refused_and_leave_nothing(
    host: Host,
    name: str,
    pool: str,
    size: int | None,
    block_size: int,
    error: type[RingstoneError],
    message: str,
) -> None:
    host.pool(capacity=8 * MIB)
    host.service.volumes.create("taken", "p", MIB, 512)
    (host.root / "pools/p/foreign.raw").write_bytes(b"precious")
    with pytest.raises(error, match=message):
        host.service.volumes.create(name, pool, size, block_size)
    assert [volume.name for volume in host.store.volumes()] == ["taken"]
    assert host.files() == ["foreign.raw", "taken.raw"]
    assert (host.root / "pools/p/foreign.raw").read_bytes() == b"precious"


@pytest.mark.parametrize("step", ["open_volume", "close_volume"])
def test_a_volume_the_engine_refuses_is_taken_back(host: Host, step: str) -> None:
    host.pool()
    host.engine.failures[step] = StorageError("The drive has gone.")
    with pytest.raises(StorageError, match="The drive has gone"):
        host.service.volumes.create("v", "p", MIB, 512)
    assert (host.store.volumes(), host.files(), host.engine.volumes()) == ([], [], [])


def test_a_failing_undo_is_told_and_can_be_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.pool()
    host.engine.failures["open_volume"] = StorageError("The drive has gone.")

    def stuck(*_: object, **__: object) -> None:
        raise OSError("read-only filesystem")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stuck)
        with pytest.raises(StorageError, match="The drive has gone"):
            host.service.volumes.create("v", "p", MIB, 512)
    assert host.levels() == [("error", "v")]
    assert host.store.volume("v").state is VolumeState.DELETING
    assert host.files() == ["v.raw"]
    host.service.volumes.delete("v")
    assert (host.store.volumes(), host.files()) == ([], [])


def test_a_foreign_file_is_seen_before_anything_is_written(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the row and the file must not make the next start take the foreign file for the
    volume's."""
    host.pool()
    (host.root / "pools/p/v.raw").write_bytes(b"precious")
    monkeypatch.setattr("ringstone.pools.file.FilePool.create_backing", lambda *_: interrupt())
    with pytest.raises(ExistsError, match="belongs to no volume"):
        host.service.volumes.create("v", "p", MIB, 512)
    host.crash_and_restart()
    assert (host.root / "pools/p/v.raw").read_bytes() == b"precious"


def test_a_foreign_file_that_comes_in_between_is_not_taken_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.pool()
    (host.root / "pools/p/v.raw").write_bytes(b"precious")
    monkeypatch.setattr("ringstone.pools.file.FilePool.refuse_foreign", lambda *_: None)
    with pytest.raises(ExistsError, match="belongs to no volume"):
        host.service.volumes.create("v", "p", MIB, 512)
    assert host.store.volumes() == []
    assert (host.root / "pools/p/v.raw").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("at", ["open_volume v", "close_volume v"])
def test_an_interrupted_creation_is_undone_at_the_next_start(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str, at: str
) -> None:
    host.pool(kind)
    died_with_undo_off(host, monkeypatch, at, lambda: host.service.volumes.create("v", "p", MIB, 512))
    assert host.files() == ["v.raw"]
    host.crash_and_restart()
    assert (host.store.volumes(), host.files()) == ([], [])
    assert host.levels() == [("warning", "v")]
    host.service.volumes.create("v", "p", MIB, 512)


def died_with_undo_off(
    host: Host, monkeypatch: pytest.MonkeyPatch, at: str, action: Callable[[], object]
) -> None:
    """Run `action`, and let the process die when the engine is called with `at`."""
    host.engine.before = lambda call: interrupt() if call == at else None
    with monkeypatch.context() as patched:
        patched.setattr("contextlib.ExitStack.callback", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            action()


def test_a_deleted_volume_is_gone(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.volumes.delete("v")
    assert (host.store.volumes(), host.files()) == ([], [])
    with pytest.raises(NotFoundError):
        host.service.volumes.delete("v")


def test_an_attached_volume_is_not_deleted(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    with pytest.raises(BusyError, match="volume detach v"):
        host.service.volumes.delete("v")
    assert host.store.volume("v").state is VolumeState.READY
    assert host.files() == ["v.raw"]


def test_a_failed_deletion_can_be_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)

    def stuck(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stuck)
        with pytest.raises(StorageError, match="Input/output error"):
            host.service.volumes.delete("v")
    assert host.store.volume("v").state is VolumeState.DELETING
    for use in (lambda: host.service.attach("v"), lambda: host.service.volumes.resize("v", 2 * MIB)):
        with pytest.raises(BusyError, match="half deleted"):
            use()
    host.service.volumes.delete("v")
    assert (host.store.volumes(), host.files()) == ([], [])


def test_an_interrupted_deletion_is_finished_at_the_next_start(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.store.set_volume_state("v", VolumeState.DELETING)
    host.crash_and_restart()
    assert (host.store.volumes(), host.files()) == ([], [])


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_volume_grows_attached_or_not(host: Host, kind: str) -> None:
    host.pool(kind)
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.volumes.resize("v", 2 * MIB)
    host.service.attach("v")
    host.service.volumes.resize("v", 3 * MIB)
    assert host.store.volume("v").size == 3 * MIB
    assert host.engine.volumes()[0].size == 3 * MIB
    (path,) = [path for top in (host.root, host.memory) for path in top.rglob("v.raw")]
    assert path.stat().st_size == 3 * MIB


def test_a_volume_that_another_host_serves_is_grown_there(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.store.claim(AttachmentRecord("v", "/run/v.sock", 1, False, 1, "other"))
    with pytest.raises(InvalidError, match="or through a manager"):
        host.service.volumes.resize("v", 2 * MIB)
    assert host.store.volume("v").size == MIB


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (MIB, InvalidError, "cannot shrink"),
        (2 * MIB, InvalidError, "already has 2 MiB"),
        (2 * MIB + 1, InvalidError, "not a multiple"),
        (9 * MIB, NoSpaceError, "6 MiB left"),
    ],
)
def test_a_size_that_cannot_be_changes_nothing(
    host: Host, size: int, error: type[RingstoneError], message: str
) -> None:
    host.pool(capacity=8 * MIB)
    host.service.volumes.create("v", "p", 2 * MIB, 512)
    host.service.attach("v")
    with pytest.raises(error, match=message):
        host.service.volumes.resize("v", size)
    assert host.store.volume("v").size == host.engine.volumes()[0].size == 2 * MIB
    assert (host.root / "pools/p/v.raw").stat().st_size == 2 * MIB


def test_a_volume_without_its_backing_does_not_grow(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    os.truncate(host.root / "pools/p/v.raw", 512)
    with pytest.raises(FailedError, match="512 bytes instead of"):
        host.service.volumes.resize("v", 2 * MIB)
    assert host.store.volume("v").size == MIB
    assert (host.root / "pools/p/v.raw").stat().st_size == 512


def test_a_growth_the_engine_refuses_is_taken_back(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.engine.failures["resize_volume"] = StorageError("No.")
    with pytest.raises(StorageError):
        host.service.volumes.resize("v", 2 * MIB)
    assert host.store.volume("v").size == MIB
    assert (host.root / "pools/p/v.raw").stat().st_size == MIB


def test_only_one_of_two_creations_gets_the_last_room(host: Host) -> None:
    host.pool(capacity=MIB)
    barrier = threading.Barrier(2)
    outcomes: list[str] = []

    def create(name: str) -> None:
        barrier.wait()
        try:
            host.service.volumes.create(name, "p", MIB, 512)
            outcomes.append("made")
        except NoSpaceError:
            outcomes.append("full")

    threads = [threading.Thread(target=create, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["full", "made"]
    assert len(host.files()) == 1


# attachments


def test_an_attachment_has_sensible_defaults(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    record = host.service.attach("v")
    assert (record.socket, record.queues, record.read_only) == (str(host.root / "run/vhost/v.sock"), 2, False)
    assert (host.root / "run/vhost").is_dir()
    assert host.store.attachment("v") == record
    host.service.detach("v")
    assert (host.store.attachments(), host.engine.attachments(), host.engine.volumes()) == ([], [], [])


def test_read_only_reaches_the_engine(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v", read_only=True)
    assert host.engine.volumes()[0].read_only


def test_attachments_that_cannot_be_are_refused_and_leave_nothing(host: Host) -> None:
    host.pool()
    for name in ("v", "w"):
        host.service.volumes.create(name, "p", MIB, 512)
    record = host.service.attach("v")
    (host.root / "sockets").mkdir()
    (host.root / "sockets/link").symlink_to("/etc")
    with pytest.raises(ExistsError, match=r"already attached at .*vhost/v\.sock"):
        host.service.attach("v", socket=str(host.memory / "other.sock"))
    cases: list[tuple[str, str, type[RingstoneError], str]] = [
        ("w", record.socket, ExistsError, "Another volume is attached"),
        ("w", "relative.sock", InvalidError, "absolute"),
        ("w", str(host.root / "w.sock"), InvalidError, "only below .*/run/vhost, .*socket_dirs"),
        ("w", str(host.memory / "../w.sock"), InvalidError, "is not allowed here"),
        ("w", str(host.root / "sockets/link/w.sock"), InvalidError, "is not allowed here"),
        ("w", "/tmp/" + "x" * 110, InvalidError, "longer than the 107 bytes"),
        ("w", str(host.memory / "missing/w.sock"), InvalidError, "directory of the socket"),
        ("x", str(host.memory / "x.sock"), NotFoundError, "no volume 'x'"),
    ]
    for name, socket, error, message in cases:
        with pytest.raises(error, match=message):
            host.service.attach(name, socket=socket)
    assert host.store.attachments() == [record]
    assert [volume.name for volume in host.engine.volumes()] == ["v"]


def test_the_longest_socket_path_is_taken(host: Host) -> None:
    """sockaddr_un has 108 bytes, the last of them a NUL: unix(7)."""
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    longest = f"{host.memory}/".ljust(107, "x")
    assert host.service.attach("v", socket=longest).socket == longest


@pytest.mark.parametrize("step", ["open_volume", "attach"])
def test_an_attachment_the_engine_refuses_is_taken_back(host: Host, step: str) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.engine.failures[step] = ExistsError("Another process listens there.")
    with pytest.raises(ExistsError, match="Another process"):
        host.service.attach("v")
    assert (host.store.attachments(), host.engine.volumes()) == ([], [])
    host.service.attach("v")


def test_a_volume_in_use_is_detached_only_by_force(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.engine.connect("v", peer_pid=1)
    with pytest.raises(BusyError):
        host.service.detach("v")
    assert host.store.attachment("v") is not None
    assert host.engine.attachments()[0].state == "running"
    host.service.detach("v", force=True)
    assert host.store.attachments() == []
    with pytest.raises(NotFoundError, match="not attached"):
        host.service.detach("v")
    with pytest.raises(NotFoundError, match="no volume"):
        host.service.detach("x")


def test_sharing_is_for_attachments_that_are_served(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    with pytest.raises(NotFoundError, match="no volume"):
        host.service.share("x", True)
    with pytest.raises(NotFoundError, match="not attached"):
        host.service.share("v", True)
    record = host.service.attach("v")
    assert host.service.share("v", True) == record
    assert host.engine.attachments()[0].shared
    for pid in (1, 2):
        host.engine.connect("v", peer_pid=pid)
    with pytest.raises(BusyError, match="Two frontends"):
        host.service.share("v", False)
    # It is for one migration: the next gateway begins without.
    host.crash_and_restart()
    assert not host.engine.attachments()[0].shared
    os.unlink(host.root / "pools/p/v.raw")
    host.crash_and_restart()
    with pytest.raises(FailedError, match="not served"):
        host.service.share("v", True)


def test_what_the_storage_shut_out_is_served_again_as_soon_as_that_is_possible(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.engine.fence_volume("v")
    host.engine.failures["open_volume"] = UnreachableError("The monitors do not answer.")
    host.service.take_back_fenced()
    assert host.engine.volumes() == []
    assert host.service.attachment_failure("v") == "The monitors do not answer."
    host.service.take_back_fenced()
    assert [(volume.fenced, volume.attached) for volume in host.engine.volumes()] == [(False, True)]
    assert host.service.attachment_failure("v") is None


def test_what_was_shut_out_and_lost_meanwhile_is_not_served_again(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    record = host.service.attach("v")
    host.engine.fence_volume("v")
    host.engine.failures["open_volume"] = UnreachableError("The monitors do not answer.")
    host.service.take_back_fenced()
    host.store.remove_attachment("v", record.epoch)
    host.service.give_up("v", None)
    host.service.take_back_fenced()
    assert host.engine.volumes() == []


def test_news_of_an_epoch_before_is_no_loss(host: Host) -> None:
    """A volume that was attached again right after its owner had changed was let go of, as the news of that came
    late."""
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.service.detach("v")
    held = host.service.attach("v")
    assert held.epoch == 2
    for late in (None, replace(held, host="b", epoch=1)):
        host.service.give_up("v", late)
        assert [one.volume for one in host.engine.attachments()] == ["v"]
    assert host.levels() == []
    for lost in (replace(held, host="b"), replace(held, epoch=3)):
        assert host.service.has_lost("v", lost)


def test_nobody_owns_it_says_the_news_and_nobody_can_be_asked(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")

    def away(_: str) -> None:
        raise UnreachableError("No member of etcd answers.")

    with monkeypatch.context() as patched:
        patched.setattr(host.store, "attachment", away)
        host.service.give_up("v", None)
    assert host.engine.attachments() == []


def test_an_interrupted_detachment_can_be_repeated(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    host.service.attach("v")
    host.engine.failures["close_volume"] = StorageError("Later.")
    with pytest.raises(StorageError):
        host.service.detach("v")
    host.service.detach("v")
    assert (host.store.attachments(), host.engine.volumes()) == ([], [])


def test_work_on_one_volume_does_not_wait_for_another(host: Host) -> None:
    host.pool()
    for name in ("slow", "quick"):
        host.service.volumes.create(name, "p", MIB, 512)
        host.service.attach(name)
    entered, leave = threading.Event(), threading.Event()

    def before(call: str) -> None:
        if call == "detach slow":
            entered.set()
            assert leave.wait(30)

    host.engine.before = before
    thread = threading.Thread(target=host.service.detach, args=("slow",))
    thread.start()
    assert entered.wait(30)
    host.service.detach("quick")
    host.service.volumes.create("new", "p", MIB, 512)
    leave.set()
    thread.join()
    assert host.store.attachments() == []


def test_what_was_done_is_told(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    record = host.service.attach("v")
    host.service.volumes.resize("v", 2 * MIB)
    host.service.detach("v")
    host.service.volumes.delete("v")
    host.service.pools.delete("p")
    assert [(event.volume, event.message) for event in host.events.latest(100)] == [
        ("", "Made file pool p."),
        ("v", "Made in pool p with 1 MiB."),
        ("v", f"Attached at {record.socket}."),
        ("v", "Grown to 2 MiB."),
        ("v", "Detached."),
        ("v", "Deleted."),
        ("", "Deleted pool p."),
    ]


def test_a_run_directory_that_cannot_be_made_is_told(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    (host.root / "run").write_text("in the way")
    with pytest.raises(RingstoneError, match="run/vhost failed"):
        host.service.attach("v")
    assert host.store.attachments() == []
