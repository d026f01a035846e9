"""Who may write a host's record into etcd: who has both a certificate and a user whose role has Ringstone's keys."""

import base64
import os
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from ringstone.errors import StateError, UnreachableError
from ringstone.lab import etcd as lab_etcd
from ringstone.lab.credentials import Certificate, Credentials
from ringstone.lab.etcd import EtcdCluster
from ringstone.lab.etcd_access import USER, EtcdAccess
from ringstone.state import HostRecord
from ringstone.state.etcd import EtcdStore
from ringstone.state.settings import EtcdSettings

CLUSTER_PAGE = Path(__file__).resolve().parents[2] / "docs/operations/cluster.md"
HOST = HostRecord("a", "id of a", ("https://10.9.9.9:7480",), "1.0", (1,), 0, 1, 1)
KEY = "/ringstone/hosts/a"


class Guarded:
    """A member that asks for certificates and users, and a client's certificate."""

    def __init__(self, folder: Path) -> None:
        self.credentials = Credentials(folder / "credentials")
        self.access = EtcdAccess(self.credentials)
        certificates = self.access.certificates(["127.0.0.1"])
        self.etcd = EtcdCluster(folder, certificates=certificates)
        self.own = self.credentials.certificate("host")

    def settings(self, certificate: Certificate | None, user: str | None, password: Path) -> EtcdSettings:
        return EtcdSettings(
            self.etcd.endpoints,
            ca=self.credentials.ca,
            cert=certificate.cert if certificate else None,
            key=certificate.key if certificate else None,
            user=user,
            password_file=password if user else None,
            total_s=0.1,
        )

    def http(self, certificate: Certificate | None) -> httpx2.Client:
        context = ssl.create_default_context(cafile=self.credentials.ca)
        if certificate is not None:
            context.load_cert_chain(certificate.cert, certificate.key)
        return httpx2.Client(base_url=self.etcd.endpoint(0), verify=context, trust_env=False)

    def etcdctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """As root."""
        password = self.access.root_password_file.read_text().strip()
        return subprocess.run(
            ["etcdctl", *words],
            env={**os.environ, **self.access.environment(self.etcd), "ETCDCTL_USER": f"root:{password}"},
            capture_output=True,
            text=True,
            check=True,
        )

    def written(self) -> str:
        return self.etcdctl("get", KEY).stdout


def run_documented(guarded: Guarded, folder: Path) -> None:
    """The commands of docs/operations/cluster.md, at this machine's etcd and with files in `folder`."""
    text = re.search(r"(?:^    .*\n)*^    etcdctl auth enable\n", CLUSTER_PAGE.read_text(), re.MULTILINE)
    assert text is not None
    commands = re.sub(r"/etc/ringstone|/root", str(folder), text[0])
    commands = re.sub(r"https://10\.0\.0\.1:2379", guarded.etcd.endpoint(0), commands)
    own = guarded.own
    for source, name in ((guarded.credentials.ca, "ca.pem"), (own.cert, "host.pem"), (own.key, "host.key")):
        shutil.copy(source, folder / name)
    subprocess.run(["bash", "-euc", commands], check=True, capture_output=True, cwd=folder)
    shutil.copy(folder / "etcd-password", guarded.access.password_file)
    shutil.copy(folder / "etcd-root-password", guarded.access.root_password_file)


@pytest.fixture(params=["the lab's", "the documented"], scope="module")
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    folder = Path(tempfile.mkdtemp(prefix="ringstone-test-", dir="/dev/shm"))
    guarded = Guarded(folder)
    try:
        guarded.etcd.start(1)
        if request.param == "the lab's":
            guarded.access.require(guarded.etcd)
        else:
            (folder / "documented").mkdir()
            run_documented(guarded, folder / "documented")
        yield guarded
    finally:
        guarded.etcd.stop()
        shutil.rmtree(folder)


def put(key: str) -> dict[str, str]:
    return {name: base64.b64encode(text.encode()).decode() for name, text in (("key", key), ("value", "x"))}


def test_a_host_with_both_announces_itself(guarded: Guarded) -> None:
    store = EtcdStore(guarded.settings(guarded.own, USER, guarded.access.password_file))
    try:
        store.announce(HOST, 15)
        assert [host.name for host in store.hosts()] == ["a"]
        assert store.host_alive("a")
        assert HOST.addresses[0] in guarded.written()
    finally:
        store.close()
        guarded.etcdctl("del", "--prefix", "/ringstone/")


def test_without_a_certificate_nobody_writes(guarded: Guarded) -> None:
    """etcd as it was documented asked nobody for anything, so whoever reached it on the network said where hosts are,
    and was sent the gateways' token."""
    with pytest.raises(UnreachableError, match="certificate"):
        EtcdStore(guarded.settings(None, USER, guarded.access.password_file))
    with guarded.http(None) as client, pytest.raises(httpx2.TransportError, match="certificate"):
        client.post("/v3/kv/put", json=put(KEY))
    assert guarded.written() == ""


def test_another_authoritys_certificate_is_none(guarded: Guarded, tmp_path: Path) -> None:
    other = Credentials(tmp_path / "other").certificate("host")
    # etcd 3.4 says that the certificate is bad, 3.5 that it does not know the authority.
    refused = "alert (bad certificate|unknown ca)"
    with guarded.http(other) as client, pytest.raises(httpx2.TransportError, match=refused):
        client.post("/v3/kv/put", json=put(KEY))
    assert guarded.written() == ""


def test_a_member_that_nobody_believes_is_not_asked_for_ever(
    guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab waited for a leader for ever, and said nothing, where Python 3.13 refused the members' certificates."""
    assert isinstance(guarded.etcd._certificates, dict)
    monkeypatch.setitem(guarded.etcd._certificates, "ca", Credentials(tmp_path / "other").ca)
    monkeypatch.setattr(lab_etcd, "_READY_SECONDS", 0.1)
    with pytest.raises(UnreachableError, match="certificate"):
        guarded.etcd.wait_for_leader()


def test_a_member_tells_root_who_leads(guarded: Guarded) -> None:
    """etcd 3.5.30 tells it nobody without a login."""
    guarded.etcd.login = ("root", guarded.access.root_password_file.read_text().strip())
    assert guarded.etcd.leader() == 0


def test_a_certificate_alone_writes_nothing(guarded: Guarded) -> None:
    """With and without the header by which etcd knows its own JSON gateway's calls: without it, it would take the
    member's certificate for the caller's, if that had a user's name."""
    with pytest.raises(StateError, match="refuses the login"):
        EtcdStore(guarded.settings(guarded.own, None, guarded.access.password_file))
    with guarded.http(guarded.own) as client:
        assert client.post("/v3/kv/put", json=put(KEY)).status_code == 400
        bare = client.build_request("POST", "/v3/kv/put", json=put(KEY))
        del bare.headers["accept"]
        assert client.send(bare).status_code == 403
    assert guarded.written() == ""


def test_a_user_without_the_role_writes_nothing(guarded: Guarded, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.touch(mode=0o600)
    password.write_text("secret\n")
    guarded.etcdctl("user", "add", "stranger:secret")
    guarded.etcdctl("role", "add", "elsewhere")
    guarded.etcdctl("role", "grant-permission", "elsewhere", "readwrite", "--prefix=true", "/ringston/")
    guarded.etcdctl("user", "grant-role", "stranger", "elsewhere")
    try:
        with pytest.raises(StateError, match=r"does not let user 'stranger' use /ringstone/"):
            EtcdStore(guarded.settings(guarded.own, "stranger", password))
        assert guarded.written() == ""
    finally:
        guarded.etcdctl("user", "delete", "stranger")
        guarded.etcdctl("role", "delete", "elsewhere")


@pytest.mark.parametrize("key", ["/ringston", "/ringstone", "/ringstone0", "/other"])
def test_the_role_ends_with_the_prefix(guarded: Guarded, key: str) -> None:
    with guarded.http(guarded.own) as client:
        login = {"name": USER, "password": guarded.access.password_file.read_text().strip()}
        token = client.post("/v3/auth/authenticate", json=login).json()["token"]
        own, other = (
            client.post("/v3/kv/put", json=put(name), headers={"Authorization": token})
            for name in ("/ringstone/x", key)
        )
        assert (own.status_code, other.status_code) == (200, 403)
        for path in ("user/add", "role/add", "disable"):
            refused = client.post(f"/v3/auth/{path}", json={"name": "x"}, headers={"Authorization": token})
            assert refused.status_code == 403
    guarded.etcdctl("del", "/ringstone/x")


def test_a_certificate_with_a_common_name_is_told(guarded: Guarded) -> None:
    """etcd's JSON gateway refuses it, in words that were reported as not being etcd's."""
    named = guarded.credentials.certificate("host", common_name=USER)
    with pytest.raises(StateError, match=r"common name.*etcd_cert"):
        EtcdStore(guarded.settings(named, USER, guarded.access.password_file))
