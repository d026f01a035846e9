"""What every store does, embedded or in etcd: what it keeps, what it refuses, and that a volume has one owner."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ringstone.errors import BusyError, ExistsError, FencedError, NotFoundError
from ringstone.state import (
    ALIVE,
    ATTACHMENTS,
    HOSTS,
    POOLS,
    AliveRecord,
    AttachmentRecord,
    Change,
    HostRecord,
    PoolRecord,
    SqliteStore,
    Store,
    VolumeRecord,
    VolumeState,
)
from tests.framework.etcd import lone_etcd as lone_etcd
from tests.framework.etcd import store_of

POOL = PoolRecord("p", "file", "/pool", 1 << 30, 1, {"direct": "auto"}, host="alpha")
VOLUME = VolumeRecord("v", "0f0e0d0c-0b0a-4908-8706-050403020100", "p", 1 << 20, 512, VolumeState.READY, 2)
ATTACHMENT = AttachmentRecord("v", "/run/v.sock", 4, True, 3, host="alpha", ha=True)
OWNED = replace(ATTACHMENT, epoch=1)
GIVEN = replace(OWNED, socket_owner="libvirt-qemu", socket_group="kvm", socket_mode="0660")
HOST = HostRecord("alpha", "11111111-2222-4333-8444-555555555555", ("10.0.0.1",), "1.0", (2, 3), 4, 5, 6)
TTL = 60


@pytest.fixture(params=["sqlite", "etcd"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store: Store
    if request.param == "sqlite":
        store = SqliteStore(tmp_path / "ringstone.db")
    else:
        store = store_of(request.getfixturevalue("lone_etcd"))
    yield store
    store.close()


def filled(store: Store) -> None:
    store.add_pool(POOL)
    store.add_volume(VOLUME)
    store.claim(ATTACHMENT)


def test_an_attachment_knows_whose_its_socket_is_and_forgets_it(store: Store) -> None:
    filled(store)
    for record in (GIVEN, OWNED):
        store.set_attachment(record)
        assert (store.attachment("v"), store.attachments()) == (record, [record])


def test_what_was_put_in_comes_out(store: Store) -> None:
    filled(store)
    owned = replace(VOLUME, epoch=1)
    assert (store.pools(), store.volumes(), store.attachments()) == ([POOL], [owned], [OWNED])
    assert (store.pool("p"), store.volume("v"), store.attachment("v")) == (POOL, owned, OWNED)


def test_taken_names_are_refused(store: Store) -> None:
    filled(store)
    with pytest.raises(ExistsError, match="pool 'p' exists"):
        store.add_pool(POOL)
    with pytest.raises(ExistsError, match="volume 'v' exists"):
        store.add_volume(replace(VOLUME, id="another"))
    with pytest.raises(ExistsError, match=r"already attached at /run/v\.sock"):
        store.claim(replace(ATTACHMENT, socket="/run/w.sock"))
    store.add_volume(replace(VOLUME, name="w", id="another"))
    with pytest.raises(ExistsError, match=r"Another volume is attached at /run/v\.sock"):
        store.claim(replace(ATTACHMENT, volume="w"))


def test_what_is_in_use_is_not_removed(store: Store) -> None:
    filled(store)
    with pytest.raises(BusyError, match="still has volumes"):
        store.remove_pool("p")
    with pytest.raises(BusyError, match="is attached"):
        store.remove_volume("v")
    store.remove_attachment("v")
    store.remove_volume("v")
    store.remove_pool("p")
    assert (store.pools(), store.volumes(), store.attachments()) == ([], [], [])


def test_what_is_not_there_is_not_found(store: Store) -> None:
    asks: list[Callable[[], object]] = [
        lambda: store.pool("p"),
        lambda: store.volume("v"),
        lambda: store.remove_pool("p"),
        lambda: store.remove_volume("v"),
        lambda: store.set_volume_size("v", 512),
        lambda: store.set_volume_state("v", VolumeState.READY),
        lambda: store.add_volume(VOLUME),
        lambda: store.claim(ATTACHMENT),
        lambda: store.remove_attachment("v"),
    ]
    for ask in asks:
        with pytest.raises(NotFoundError):
            ask()
    assert store.attachment("v") is None


def test_a_volume_that_is_not_attached_cannot_be_detached(store: Store) -> None:
    filled(store)
    store.remove_attachment("v")
    with pytest.raises(NotFoundError, match="is not attached"):
        store.remove_attachment("v")


def test_volumes_change_and_are_listed_by_pool(store: Store) -> None:
    filled(store)
    store.add_pool(replace(POOL, name="q"))
    store.add_volume(replace(VOLUME, name="a", id="another", pool="q"))
    store.set_volume_size("v", 2 << 20)
    store.set_volume_state("v", VolumeState.DELETING)
    assert [volume.name for volume in store.volumes()] == ["a", "v"]
    assert store.volumes("p") == [replace(VOLUME, size=2 << 20, state=VolumeState.DELETING, epoch=1)]


# owners


def test_each_owner_has_a_later_epoch(store: Store) -> None:
    filled(store)
    with pytest.raises(ExistsError, match=r"of host 'alpha'.*detach v"):
        store.claim(replace(ATTACHMENT, socket="/run/other.sock"))
    with pytest.raises(ExistsError, match=r"of host 'alpha'.*take the volume over"):
        store.claim(replace(ATTACHMENT, host="beta"))
    assert store.volume("v").epoch == 1
    store.set_attachment_client("v", 1, {"cookie": 7})
    claim = store.claim(replace(ATTACHMENT, host="beta"), take_over=True)
    assert claim.previous == replace(OWNED, client={"cookie": 7})
    assert claim.attachment == replace(ATTACHMENT, host="beta", epoch=2)
    assert (store.volume("v").epoch, store.attachment("v")) == (2, claim.attachment)
    store.remove_attachment("v", epoch=2)
    assert store.volume("v").epoch == 2
    again = store.claim(ATTACHMENT, take_over=True)
    assert (again.attachment.epoch, again.previous) == (3, None)


def test_an_owner_that_was_replaced_changes_nothing_any_more(store: Store) -> None:
    filled(store)
    new = store.claim(replace(ATTACHMENT, host="beta"), take_over=True).attachment
    late: list[Callable[[], object]] = [
        lambda: store.set_attachment_client("v", 1, {"cookie": 7}),
        lambda: store.set_attachment(replace(OWNED, queues=1)),
        lambda: store.set_attachment(replace(OWNED, epoch=2)),
        lambda: store.remove_attachment("v", epoch=1),
    ]
    for change in late:
        with pytest.raises(FencedError, match=r"beta.*since epoch 2"):
            change()
    assert store.attachment("v") == new
    store.remove_attachment("v")
    with pytest.raises(FencedError, match="attached nowhere"):
        store.set_attachment_client("v", 2, {})


def test_an_owner_changes_its_attachment(store: Store) -> None:
    filled(store)
    changed = replace(OWNED, queues=1, socket="/run/other.sock")
    store.set_attachment(changed)
    assert store.set_attachment_client("v", 1, {"cookie": "c"}) == replace(changed, client={"cookie": "c"})
    # The socket it had is free, the one it has is not.
    store.add_volume(replace(VOLUME, name="w", id="another"))
    with pytest.raises(ExistsError, match="choose another socket"):
        store.claim(replace(ATTACHMENT, volume="w", socket=changed.socket))
    store.claim(replace(ATTACHMENT, volume="w"))
    with pytest.raises(ExistsError, match="choose another socket"):
        store.set_attachment(OWNED)


def test_two_hosts_may_use_the_same_path(store: Store) -> None:
    filled(store)
    store.add_volume(replace(VOLUME, name="w", id="another"))
    store.claim(replace(ATTACHMENT, volume="w", host="beta"))
    with pytest.raises(ExistsError, match="choose another socket"):
        store.claim(replace(ATTACHMENT, host="beta"), take_over=True)
    assert store.attachment("v") == OWNED


def test_of_many_who_claim_at_once_one_becomes_the_owner(store: Store) -> None:
    """In each round all want the volume of the owner that they saw."""
    rounds, contenders = 5, 8
    filled(store)
    won: list[tuple[int, str]] = []
    start = threading.Barrier(contenders)

    def contend(host: str) -> None:
        for _ in range(rounds):
            seen = store.volume("v").epoch
            start.wait()

            def take(seen: int = seen) -> int | None:
                if store.volume("v").epoch != seen:
                    return None
                return store.claim(replace(ATTACHMENT, host=host), take_over=True).attachment.epoch

            epoch = store.transact(take)
            if epoch is not None:
                won.append((epoch, host))
            start.wait()

    in_threads(*(lambda host=f"host{n}": contend(host) for n in range(contenders)))
    assert sorted(epoch for epoch, _ in won) == list(range(2, rounds + 2))
    last = store.attachment("v")
    assert last is not None
    assert (last.epoch, last.host) == max(won)


def test_every_unconditional_claim_has_an_epoch_of_its_own(store: Store) -> None:
    filled(store)
    claims, threads = 5, 4
    epochs: list[int] = []

    def claim(host: str) -> None:
        mine = [
            store.claim(replace(ATTACHMENT, host=host), take_over=True).attachment.epoch
            for _ in range(claims)
        ]
        assert mine == sorted(mine)
        epochs.extend(mine)

    in_threads(*(lambda host=f"host{n}": claim(host) for n in range(threads)))
    assert sorted(epochs) == list(range(2, claims * threads + 2))


def in_threads(*steps: Callable[[], None]) -> None:
    """All at once; the first failure is raised here."""
    failures: list[BaseException] = []

    def run(step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# transactions


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    def step() -> None:
        store.add_pool(POOL)
        store.add_volume(VOLUME)
        store.add_pool(POOL)

    with pytest.raises(ExistsError):
        store.transact(step)
    assert (store.pools(), store.volumes()) == ([], [])
    filled(store)


def test_a_transaction_reads_what_it_wrote(store: Store) -> None:
    filled(store)

    def step() -> list[str]:
        store.remove_attachment("v")
        store.remove_volume("v")
        store.add_volume(replace(VOLUME, name="w", size=512))
        store.transact(lambda: store.set_volume_size("w", 1024))
        assert (store.attachment("v"), store.volume("w").size) == (None, 1024)
        return [volume.name for volume in store.volumes()]

    assert store.transact(step) == ["w"]
    assert ([volume.name for volume in store.volumes()], store.attachments()) == (["w"], [])


def test_no_sum_is_exceeded_by_those_who_add_at_once(store: Store) -> None:
    """Each looks at what all volumes take and adds one if there is room: a range of keys is read, not one."""
    room = 6
    store.add_pool(POOL)

    def add(name: str) -> bool:
        if len(store.volumes("p")) >= room:
            return False
        store.add_volume(replace(VOLUME, name=name, id=name))
        return True

    def worker(n: int) -> None:
        for turn in range(3):
            store.transact(partial(add, f"v{n}-{turn}"))

    in_threads(*(lambda n=n: worker(n) for n in range(4)))
    assert len(store.volumes()) == room


def test_the_last_of_a_pair_stays(store: Store) -> None:
    """Two threads remove one pool each, as long as another is there: deletions too are seen by who read a range."""
    for _ in range(5):
        for name in ("a", "b"):
            store.add_pool(replace(POOL, name=name))
        together = threading.Barrier(2)

        def remove(name: str, together: threading.Barrier = together) -> None:
            def step() -> None:
                if len(store.pools()) > 1:
                    store.remove_pool(name)

            together.wait()
            store.transact(step)

        in_threads(lambda: remove("a"), lambda: remove("b"))
        (left,) = store.pools()
        store.remove_pool(left.name)


# hosts


def test_a_host_is_known_and_alive_once_announced(store: Store) -> None:
    assert not store.host_alive("alpha")
    store.announce(HOST, TTL)
    store.announce(replace(HOST, seen_ns=50, created_ns=60, version="1.1", free_cores=1), TTL)
    assert store.hosts() == [replace(HOST, seen_ns=50, version="1.1", free_cores=1)]
    assert (store.host_alive("alpha"), store.host_alive("beta")) == (True, False)
    assert store.alive_hosts() == {"alpha"}


def test_two_machines_of_one_name_are_told(store: Store) -> None:
    store.announce(HOST, TTL)
    with pytest.raises(ExistsError, match=r"Another machine runs as host 'alpha'.*another name"):
        store.announce(replace(HOST, id="another"), TTL)
    with pytest.raises(ExistsError, match="known as host 'alpha', not 'beta'"):
        store.announce(replace(HOST, name="beta"), TTL)
    assert store.hosts() == [HOST]
    assert store.alive_hosts() == {"alpha"}


def test_a_host_that_is_alive_is_not_removed(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no host 'alpha'"):
        store.remove_host("alpha")
    store.announce(HOST, TTL)
    with pytest.raises(BusyError, match="is alive"):
        store.remove_host("alpha")


# changes


def test_a_watch_tells_what_is_and_then_what_changes(store: Store) -> None:
    filled(store)
    watch = store.watch(ATTACHMENTS)
    changes = iter(watch)
    assert next(changes) == Change("v", OWNED)
    claimed = store.claim(replace(ATTACHMENT, host="beta"), take_over=True).attachment
    assert next(changes) == Change("v", claimed)
    # What is no attachment is not told.
    store.set_volume_size("v", 2 << 20)
    store.remove_attachment("v")
    gone: Change[AttachmentRecord] = Change("v", None)
    assert next(changes) == gone
    watch.close()
    assert next(changes, None) is None


def test_a_watch_ends_from_another_thread(store: Store) -> None:
    store.add_pool(POOL)
    watch = store.watch(POOLS)
    seen: list[Change[PoolRecord]] = []
    first = threading.Event()

    def follow() -> None:
        for change in watch:
            seen.append(change)
            first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    first.wait()
    watch.close()
    watch.close()
    thread.join()
    assert seen == [Change("p", POOL)]


def test_hosts_and_their_lives_are_watched(store: Store) -> None:
    hosts = store.watch(HOSTS)
    alive = store.watch(ALIVE)
    store.announce(HOST, TTL)
    assert next(iter(hosts)) == Change("alpha", HOST)
    assert next(iter(alive)) == Change("alpha", AliveRecord("alpha", HOST.id))
    hosts.close()
    alive.close()
