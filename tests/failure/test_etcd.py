"""State in etcd while etcd is harmed: no change is lost, doubled or reported wrongly."""

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ringstone.errors import (
    ExistsError,
    InvalidError,
    NoSpaceError,
    RingstoneError,
    StateError,
    UnreachableError,
)
from ringstone.lab.etcd import EtcdCluster, free_ports
from ringstone.state import (
    ALIVE,
    ATTACHMENTS,
    AttachmentRecord,
    Change,
    HostRecord,
    PoolRecord,
    VolumeRecord,
    VolumeState,
)
from ringstone.state.etcd import EtcdStore
from ringstone.state.etcd_transaction import Snapshot
from ringstone.state.settings import EtcdSettings
from tests.framework.etcd import Proxy, settings_of, store_of
from tests.framework.etcd import etcd as etcd
from tests.framework.etcd import lone_etcd as lone_etcd

POOL = PoolRecord("p", "rbd", None, None, 1)
VOLUME = VolumeRecord("v", "an id", "p", 512, 512, VolumeState.READY, 2)
ATTACHMENT = AttachmentRecord("v", "/run/v.sock", 1, False, 3, host="alpha")
HOST = HostRecord("alpha", "id of alpha", (), "1.0", (1,), 0, 1, 1)


@contextmanager
def opened(cluster: EtcdCluster, prefix: str | None = None) -> Iterator[EtcdStore]:
    store = store_of(cluster, prefix)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def proxied(
    cluster: EtcdCluster, *, attempt_s: float = 1.0, total_s: float = 20.0
) -> Iterator[tuple[Proxy, EtcdStore]]:
    """A store that reaches a cluster of one only through a proxy."""
    proxy = Proxy(cluster.endpoint(0))
    try:
        settings = replace(
            settings_of(cluster, attempt_s=attempt_s), endpoints=(proxy.endpoint,), total_s=total_s
        )
        store = EtcdStore(settings)
        try:
            yield proxy, store
        finally:
            proxy.delay_s = 0
            store.close()
    finally:
        proxy.close()


def filled(store: EtcdStore) -> None:
    store.add_pool(POOL)
    store.add_volume(VOLUME)
    store.claim(ATTACHMENT)


class Stream:
    """Threads that go on making changes until they are told to stop, and know what was reported to them as done."""

    def __init__(self, stores: list[EtcdStore]) -> None:
        self.epochs: list[int] = []
        self.added: list[str] = []
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._more = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=(n, store)) for n, store in enumerate(stores)
        ]

    def __enter__(self) -> "Stream":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, n: int, store: EtcdStore) -> None:
        turn = 0
        try:
            while not self._stop.is_set():
                name = f"v{n}-{turn}"
                store.add_volume(replace(VOLUME, name=name))
                claim = store.claim(replace(ATTACHMENT, host=f"host{n}"), take_over=True)
                with self._more:
                    self.added.append(name)
                    self.epochs.append(claim.attachment.epoch)
                    self._more.notify_all()
                turn += 1
        except BaseException as error:
            with self._more:
                self.failures.append(error)
                self._more.notify_all()

    def wait_for_more(self, count: int = 10) -> None:
        """Until that many changes have been made from now on."""
        with self._more:
            wanted = len(self.epochs) + count
            self._more.wait_for(lambda: self.failures or len(self.epochs) >= wanted)

    def check(self, store: EtcdStore) -> None:
        """An epoch that two were told, or one that nobody was, is a change that was doubled or lost."""
        assert not self.failures, self.failures
        assert sorted(self.epochs) == list(range(2, len(self.epochs) + 2))
        assert store.volume("v").epoch == len(self.epochs) + 1
        assert {volume.name for volume in store.volumes()} == {"v", *self.added}


def test_a_killed_leader_loses_and_doubles_nothing(etcd: EtcdCluster) -> None:
    with opened(etcd) as store, opened(etcd, store.prefix) as other:
        filled(store)
        with Stream([store, other]) as stream:
            for _ in range(2):
                stream.wait_for_more()
                leader = etcd.wait_for_leader()
                etcd.kill(leader)
                stream.wait_for_more()
                etcd.restart(leader)
        stream.check(store)


@pytest.mark.parametrize("who", ["leader", "follower"])
def test_a_member_that_is_cut_off_holds_nobody_up(etcd: EtcdCluster, who: str) -> None:
    """It is stopped: connections stay, and nothing is answered."""
    with opened(etcd) as store, opened(etcd, store.prefix) as other:
        filled(store)
        with Stream([store, other]) as stream:
            stream.wait_for_more()
            leader = etcd.wait_for_leader()
            victim = leader if who == "leader" else (leader + 1) % 3
            etcd.pause(victim)
            stream.wait_for_more()
            etcd.resume(victim)
            stream.wait_for_more()
        stream.check(store)


def test_without_a_majority_nothing_is_done_and_that_is_told(etcd: EtcdCluster) -> None:
    settings = replace(settings_of(etcd, attempt_s=0.5), total_s=1)
    store = EtcdStore(settings)
    filled(store)
    etcd.kill(0)
    etcd.kill(1)
    with pytest.raises(UnreachableError, match=r"etcd does not answer at http.*most of its members"):
        store.volume("v")
    with pytest.raises(UnreachableError, match="most of its members"):
        store.claim(ATTACHMENT, take_over=True)
    etcd.restart_all()
    assert store.volume("v").epoch == 1
    assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == 2
    store.close()


def test_a_change_whose_answer_was_lost_is_found(lone_etcd: EtcdCluster) -> None:
    with proxied(lone_etcd) as (proxy, store):
        filled(store)
        proxy.lose_answers(1)
        assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == 2
        assert proxy.harmed.is_set()
        assert store.volume("v").epoch == 2
        # Also when the answer of the look is lost.
        proxy.lose_answers(2)
        assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == 3
        assert store.volume("v").epoch == 3


def test_a_change_that_arrives_too_late_has_no_effect(lone_etcd: EtcdCluster) -> None:
    """It was given up and made anew by then, and nothing else of what it had read has changed."""
    with proxied(lone_etcd) as (proxy, store):
        filled(store)
        proxy.hold_requests(1)
        store.add_pool(replace(POOL, name="q"))
        assert proxy.harmed.is_set()
        store.remove_pool("q")
        (late,) = proxy.let_go()
        assert b"succeeded" not in late
        assert [pool.name for pool in store.pools()] == ["p"]


def test_a_change_that_may_yet_arrive_is_reported_as_that(lone_etcd: EtcdCluster) -> None:
    with proxied(lone_etcd, total_s=0.2) as (proxy, store):
        filled(store)
        proxy.hold_requests(1000)
        with pytest.raises(UnreachableError, match="not known; look before it is repeated"):
            store.add_pool(replace(POOL, name="q"))
        proxy.hold_requests(0)
        proxy.let_go()
        assert [pool.name for pool in store.pools()] == ["p", "q"]


def test_a_change_that_filled_etcd_is_not_reported_as_refused(lone_etcd: EtcdCluster) -> None:
    """etcd answers with NOSPACE to the change that has reached its quota, although it has made that."""
    with proxied(lone_etcd) as (proxy, store):
        filled(store)
        full = b'{"error":"etcdserver: mvcc: database space exceeded","code":8}'
        proxy.lose_answers(
            1,
            instead=b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n%s" % (len(full), full),
        )
        assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == 2
        assert proxy.harmed.is_set()
        assert store.volume("v").epoch == 2


def test_a_transaction_reads_one_state(lone_etcd: EtcdCluster) -> None:
    """Also one that changes nothing, or fails, which no comparison at a commit puts right."""
    with opened(lone_etcd) as store, opened(lone_etcd, store.prefix) as other:
        filled(store)

        def step() -> tuple[int, int]:
            epoch = store.volume("v").epoch
            other.claim(ATTACHMENT, take_over=True)
            held = store.attachment("v")
            assert held is not None
            return epoch, held.epoch

        assert store.transact(step) == (1, 1)


def test_a_slow_etcd_only_takes_longer(lone_etcd: EtcdCluster) -> None:
    """Answers come later than a member is given, now and then: each change is still made once."""
    with proxied(lone_etcd, attempt_s=0.3) as (proxy, store):
        filled(store)
        for turn, delay_s in enumerate((0.05, 0.5, 0.05)):
            proxy.delay_s = delay_s
            if delay_s < 0.3:
                assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == turn + 2
                continue
            slow = threading.Timer(0.6, partial(setattr, proxy, "delay_s", 0.0))
            slow.start()
            assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == turn + 2
            slow.join()
        assert store.volume("v").epoch == 4


def refusal(call: Callable[[], object]) -> RingstoneError | None:
    try:
        call()
    except RingstoneError as error:
        return error
    return None


def large_pool(name: str) -> PoolRecord:
    return replace(POOL, name=name, options={"ballast": "x" * 500_000})


def test_a_full_etcd_is_told_and_goes_on_when_there_is_room() -> None:
    with small_etcd() as cluster, opened(cluster) as store:
        filled(store)
        added = 0
        while (error := refusal(partial(store.add_pool, large_pool(f"q{added}")))) is None:
            added += 1
        assert isinstance(error, NoSpaceError)
        assert re.search(r"is full \(NOSPACE\).*etcdctl alarm disarm", error.message)
        # What was reported as done is there, what was not is not; and it can still be read.
        assert [pool.name for pool in store.pools()] == ["p", *sorted(f"q{n}" for n in range(added))]
        with pytest.raises(NoSpaceError, match="Nothing was changed"):
            store.claim(ATTACHMENT, take_over=True)
        with pytest.raises(NoSpaceError):
            store.announce(HOST, 60)
        assert store.volume("v").epoch == 1
        for n in range(added):
            etcdctl(cluster, "del", f"{store.prefix}pools/q{n}")
        etcdctl(cluster, "compact", str(store_revision(store)))
        etcdctl(cluster, "defrag")
        etcdctl(cluster, "alarm", "disarm")
        assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == 2


@contextmanager
def small_etcd(certificates: dict[str, Path] | None = None) -> Iterator[EtcdCluster]:
    directory = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
    cluster = EtcdCluster(directory, quota_bytes=4 << 20, certificates=certificates)
    try:
        cluster.start(1)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory)


def store_revision(store: EtcdStore) -> int:
    snapshot = Snapshot(store._client)
    snapshot.get(f"{store.prefix}schema")
    return snapshot.revision


def etcdctl(cluster: EtcdCluster, *words: str) -> str:
    command = ["etcdctl", f"--endpoints={','.join(cluster.endpoints)}", *words]
    environment = {"PATH": "/usr/bin:/bin", "ETCDCTL_API": "3"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_watch_survives_lost_members_and_compaction(etcd: EtcdCluster) -> None:
    with opened(etcd) as store, opened(etcd, store.prefix) as other:
        store.add_pool(POOL)
        store.add_volume(VOLUME)
        watch = store.watch(ATTACHMENTS)
        changes = iter(watch)
        claimed = other.claim(ATTACHMENT).attachment
        assert next(changes) == Change("v", claimed)
        # While the member that it asks is down, the past is compacted.
        etcd.kill(0)
        for _ in range(3):
            claimed = other.claim(ATTACHMENT, take_over=True).attachment
        compact(etcd, 1, store_revision(other))
        seen = next(changes)
        while seen != Change("v", claimed):
            seen = next(changes)
        other.remove_attachment("v")
        gone: Change[AttachmentRecord] = Change("v", None)
        assert next(changes) == gone
        watch.close()


def compact(cluster: EtcdCluster, member: int, revision: int) -> None:
    with cluster.client() as client:
        body = {"revision": str(revision), "physical": True}
        client.post(f"{cluster.endpoint(member)}/v3/kv/compaction", json=body).raise_for_status()


def test_a_transaction_whose_revision_was_compacted_is_run_again(lone_etcd: EtcdCluster) -> None:
    with opened(lone_etcd) as store, opened(lone_etcd, store.prefix) as other:
        filled(store)
        runs: list[int] = []

        def step() -> int:
            store.volume("v")
            if not runs:
                other.set_volume_size("v", 1024)
                compact(lone_etcd, 0, store_revision(other))
            runs.append(1)
            store.pool("p")
            store.set_volume_size("v", store.volume("v").size + 1)
            return store.volume("v").size

        assert store.transact(step) == 1025


def test_a_host_is_dead_when_its_lease_has_run_out(lone_etcd: EtcdCluster) -> None:
    with opened(lone_etcd) as store, opened(lone_etcd, store.prefix) as other:
        store.announce(HOST, 1)
        assert other.alive_hosts() == {"alpha"}
        watch = other.watch(ALIVE)
        changes = iter(watch)
        assert next(changes).record is not None
        assert next(changes).record is None
        watch.close()
        assert not other.host_alive("alpha")
        assert other.hosts() == [HOST]
        # Another machine does not become it by itself; and what the first left is still its own.
        with pytest.raises(ExistsError, match="known as another machine, which is not running"):
            other.announce(replace(HOST, id="another"), 60)
        store.announce(HOST, 60)
        assert other.host_alive("alpha")
        with pytest.raises(ExistsError, match="Another machine runs as host 'alpha'"):
            other.announce(replace(HOST, id="another"), 60)


def test_a_newer_layout_is_begun_by_what_needs_it_and_by_nothing_else(
    lone_etcd: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster is upgraded one host after the other: the hosts to come must be able to write until then."""
    with opened(lone_etcd) as store, opened(lone_etcd, store.prefix) as other:
        filled(store)
        held = store.attachment("v")
        assert held is not None
        read = partial(etcdctl, lone_etcd, "get", "--print-value-only")
        assert read(f"{store.prefix}schema").strip() == "1"
        assert "socket_owner" not in read(f"{store.prefix}attachments/v")
        store.set_attachment(replace(held, socket_owner="qemu"))
        assert read(f"{store.prefix}schema").strip() == "2"
        # Both go on, and a release before does not.
        for one in (store, other):
            one.set_attachment(replace(held, socket_owner=None))
        monkeypatch.setattr("ringstone.state.etcd.SCHEMA_VERSION", 1)
        with pytest.raises(StateError, match="has schema 2, and this Ringstone knows up to 1"):
            EtcdStore.check(settings_of(lone_etcd, store.prefix))


def test_what_cannot_be_used_is_refused(lone_etcd: EtcdCluster) -> None:
    with opened(lone_etcd) as store:
        newer = store.prefix
        etcdctl(lone_etcd, "put", f"{newer}schema", "3")
        for use in (EtcdStore, EtcdStore.check):
            with pytest.raises(StateError, match="has schema 3, and this Ringstone knows up to 2"):
                use(settings_of(lone_etcd, newer))
        # One that ran already writes no more either.
        with pytest.raises(StateError, match="has schema 3"):
            store.add_pool(POOL)
        etcdctl(lone_etcd, "put", "/foreign/key", "value")
        with pytest.raises(StateError, match="are not Ringstone's"):
            EtcdStore(settings_of(lone_etcd, "/foreign/"))
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(UnreachableError, match=f"does not answer at {nobody}"):
        EtcdStore(EtcdSettings((nobody,), total_s=0.1))


def test_members_of_two_clusters_are_told_apart(lone_etcd: EtcdCluster) -> None:
    with small_etcd() as other:
        settings = replace(settings_of(lone_etcd), endpoints=lone_etcd.endpoints + other.endpoints)
        store = EtcdStore(settings)
        filled(store)
        store._client.next_endpoint(lone_etcd.endpoint(0))
        with pytest.raises(StateError, match="belongs to another etcd cluster"):
            store.volume("v")
        store.close()


def test_tls_and_a_password_are_used_and_their_lack_is_told(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    with small_etcd(certificates) as cluster:
        setup = (["user", "add", "root:secret"], ["user", "grant-role", "root", "root"], ["auth", "enable"])
        tls = [
            f"--cacert={certificates['ca']}",
            f"--cert={certificates['cert']}",
            f"--key={certificates['key']}",
        ]
        etcdctl(cluster, *tls, "role", "add", "root")
        for words in setup:
            etcdctl(cluster, *tls, *words)
        password = tmp_path / "password"
        password.touch(mode=0o600)
        password.write_text("secret\n")
        right = replace(
            settings_of(cluster),
            user="root",
            password_file=password,
            total_s=0.1,
            **certificates,  # type: ignore[arg-type]
        )
        store = EtcdStore(right)
        filled(store)
        # A token that the members no longer know is got anew, without a change made twice.
        store._client._token = "old.1"
        assert store.claim(ATTACHMENT, take_over=True).attachment.epoch == 2
        store.close()
        with pytest.raises(UnreachableError, match="certificate"):
            EtcdStore(replace(right, ca=None))
        with pytest.raises(UnreachableError):
            EtcdStore(replace(right, cert=None, key=None))
        with pytest.raises(InvalidError, match="certificates for etcd cannot be used"):
            EtcdStore(replace(right, ca=tmp_path / "missing"))
        with pytest.raises(StateError, match="refuses the login"):
            EtcdStore(replace(right, user=None, password_file=None))
        password.write_text("wrong")
        with pytest.raises(StateError, match=r"refuses the login.*etcd_password_file"):
            EtcdStore(right)


def make_certificates(directory: Path) -> dict[str, Path]:
    """An authority and one certificate of it, for 127.0.0.1 and for clients."""
    made = {name: directory / f"{name}.pem" for name in ("ca", "cert", "key")}
    ca_key, request, extensions = (directory / name for name in ("ca-key.pem", "request.pem", "extensions"))
    extensions.write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    sign = ["openssl", "x509", "-req", "-CAcreateserial"]
    commands: list[list[str | Path]] = [
        [*new, "-x509", "-subj", "/CN=authority", "-keyout", ca_key, "-out", made["ca"]],
        [*new, "-subj", "/O=member", "-keyout", made["key"], "-out", request],
        [
            *sign,
            "-in",
            request,
            "-CA",
            made["ca"],
            "-CAkey",
            ca_key,
            "-extfile",
            extensions,
            "-out",
            made["cert"],
        ],
    ]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return made


def test_nothing_is_left_in_etcd_but_the_records(lone_etcd: EtcdCluster) -> None:
    store = store_of(lone_etcd)
    filled(store)
    store.remove_attachment("v")
    store.close()
    keys = etcdctl(lone_etcd, "get", "--prefix", "--keys-only", store.prefix).split()
    assert sorted(key.removeprefix(store.prefix) for key in keys) == [
        "pools/p",
        "removals/attachments",
        "schema",
        "volumes/v",
    ]
