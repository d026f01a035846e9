"""To whom a manager shows a gateway's token: never to somebody who only says where he is."""

import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from ringstone import models
from ringstone.client import RemoteClient
from ringstone.errors import InvalidError, NoDeviceError, UntrustedError
from ringstone.lab.credentials import Certificate, Credentials
from ringstone.manager.hosts import connector
from ringstone.manager.tokens import GatewayTokens
from ringstone.manager.trust import check_url
from tests.framework.manager import TOKEN, Cluster, cluster

__all__ = ["cluster"]

CLUSTER_PAGE = Path(__file__).resolve().parents[2] / "docs/operations/cluster.md"


class Listener:
    """A server of the test's, on 127.0.0.1, which keeps what it is sent and answers everything with a health that is
    good. With a `certificate` it speaks TLS."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self._context = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate.cert, certificate.key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self.heard = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self._context is not None:
                    connection = self._context.wrap_socket(connection, server_side=True)
                self._answer(connection)
            except OSError:  # also ssl.SSLError: the client has refused the certificate
                pass
            finally:
                connection.close()

    def _answer(self, connection: socket.socket) -> None:
        while piece := connection.recv(65536):
            self.heard += piece
            if self.heard.endswith(b"\r\n\r\n"):
                body = b'{"status":"ok","reasons":[]}'
                head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                return

    def close(self) -> None:
        # Closing alone does not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@contextmanager
def listening(certificate: Certificate | None = None) -> Iterator[Listener]:
    listener = Listener(certificate)
    try:
        yield listener
    finally:
        listener.close()


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    return Credentials(tmp_path / "credentials")


def announced(cluster: Cluster, name: str, url: str) -> None:
    """Somebody who can write to etcd says that host `name` is at `url`."""
    record = next(host for host in cluster.store.hosts() if host.name == name)
    cluster.store.announce(replace(record, addresses=(url,)), 15)


def row(client: RemoteClient, name: str) -> models.Host:
    """Of the list of hosts."""
    return next(host for host in client.hosts() if host.name == name)


def manager(cluster: Cluster, ca: Path | None) -> RemoteClient:
    """Of one that connects as it does at work, to host a; the others stay in this process."""
    return cluster.client(cluster.operations({"a": connector(ca)}))


def test_a_url_without_tls_is_sent_no_token(cluster: Cluster, credentials: Credentials) -> None:
    """The manager showed the gateways' token to whatever URL stood in etcd, over plain http too; so whoever wrote a
    host's record there had the token, and with it every host."""
    with listening() as stranger:
        announced(cluster, "a", f"http://127.0.0.1:{stranger.port}")
        client = manager(cluster, credentials.ca)
        told = row(client, "a").reason
        assert told is not None
        for part in ("host 'a'", f"http://127.0.0.1:{stranger.port}", "tls_cert", "gateway_ca"):
            assert part in told
        with pytest.raises(UntrustedError, match="tls_cert"):
            client.create_pool(models.PoolCreate(name="p", type="null", host="a"))
        assert any("host 'a'" in reason for reason in client.health().reasons)
        assert (stranger.connections, stranger.heard) == (0, b"")
        assert row(client, "b").reason is None


def test_a_certificate_for_another_name_is_sent_no_token(cluster: Cluster, credentials: Credentials) -> None:
    """The certificate was only compared with the address in the URL, which whoever wrote the URL had chosen: any host
    of the cluster, or with public authorities anybody, passed for any other."""
    certificate = credentials.certificate("127.0.0.1", "b")
    with listening(certificate) as stranger:
        url = f"https://127.0.0.1:{stranger.port}"
        announced(cluster, "a", url)
        client = manager(cluster, credentials.ca)
        told = row(client, "a").reason
        assert told is not None
        for part in ("host 'a'", url, "DNS:a"):
            assert part in told
        with pytest.raises(UntrustedError, match="DNS:a"):
            client.create_pool(models.PoolCreate(name="p", type="null", host="a"))
        assert stranger.connections
        assert stranger.heard == b""


def test_a_common_name_is_no_name(cluster: Cluster, credentials: Credentials) -> None:
    certificate = credentials.certificate("127.0.0.1", common_name="a")
    with listening(certificate) as stranger:
        announced(cluster, "a", f"https://127.0.0.1:{stranger.port}")
        assert "DNS:a" in (row(manager(cluster, credentials.ca), "a").reason or "")
        assert stranger.heard == b""


def test_another_authoritys_certificate_is_sent_no_token(
    cluster: Cluster, credentials: Credentials, tmp_path: Path
) -> None:
    other = Credentials(tmp_path / "other")
    with listening(other.certificate("127.0.0.1", "a")) as stranger:
        announced(cluster, "a", f"https://127.0.0.1:{stranger.port}")
        assert "gateway_ca" in (row(manager(cluster, credentials.ca), "a").reason or "")
        assert stranger.heard == b""


def signed_by_a_host(folder: Path, host: Certificate, name: str) -> Certificate:
    """A certificate for `name` that whoever has the key of `host` has made with it, with the chain up to it."""
    cert, key = folder / "forged.pem", folder / "forged.key"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/O=forged", "-addext", f"subjectAltName=DNS:{name}"]
    by = ["-CA", str(host.cert), "-CAkey", str(host.key), "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*new, *names, *by], check=True, capture_output=True)
    cert.write_text(cert.read_text() + host.cert.read_text())
    return Certificate(cert, key)


def older_certificates(folder: Path) -> tuple[Path, Certificate]:
    """As documented_certificates(), by the commands of before, whose authority has no key usage."""
    return documented_certificates(folder, leave_out='-addext "keyUsage=critical,keyCertSign,cRLSign" ')


def documented_certificates(folder: Path, *, leave_out: str = "") -> tuple[Path, Certificate]:
    """The authority and host a's certificate, made by the commands of docs/operations/cluster.md."""
    step = CLUSTER_PAGE.read_text().partition("Certificates and tokens\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^    (openssl req .*(?:\n        .*)*)", step, re.MULTILINE)
    assert len(commands) == 2, commands
    assert leave_out in commands[0]
    for command in commands:
        subprocess.run(
            ["bash", "-euc", command.replace(leave_out, "")], cwd=folder, check=True, capture_output=True
        )
    return folder / "ca.pem", Certificate(folder / "a.pem", folder / "a.key")


@pytest.mark.parametrize("whose", ["the lab's", "the documented"])
def test_a_host_signs_no_certificates_for_others(
    cluster: Cluster, credentials: Credentials, tmp_path: Path, whose: str
) -> None:
    """The certificates that our commands made for hosts were authorities themselves, as openssl makes them unless it is
    told otherwise. So any host could make a certificate for any other one's name."""
    if whose == "the lab's":
        ca, own = credentials.ca, credentials.certificate("10.0.0.1", "a")
    else:
        ca, own = documented_certificates(tmp_path)
    with listening(own) as honest, listening(signed_by_a_host(tmp_path, own, "b")) as forged:
        announced(cluster, "a", f"https://127.0.0.1:{honest.port}")
        announced(cluster, "b", f"https://127.0.0.1:{forged.port}")
        client = cluster.client(cluster.operations({"a": connector(ca), "b": connector(ca)}))
        assert row(client, "a").reason is None
        assert "gateway_ca" in (row(client, "b").reason or "")
        assert forged.heard == b""


def test_an_authority_without_a_key_usage_is_one(cluster: Cluster, tmp_path: Path) -> None:
    """Python 3.13 refuses it, and our documents had people make such a one: after an upgrade of the machine no host was
    believed any more, and etcd no longer either."""
    ca, own = older_certificates(tmp_path)
    with listening(own) as host:
        announced(cluster, "a", f"https://127.0.0.1:{host.port}")
        assert row(manager(cluster, ca), "a").reason is None


@pytest.mark.parametrize("whose", ["the lab's", "the documented"])
def test_certificates_please_the_strictest(credentials: Credentials, tmp_path: Path, whose: str) -> None:
    """As everybody's clients in Python 3.13 are by themselves."""
    if whose == "the lab's":
        ca, own = credentials.ca, credentials.certificate("10.0.0.1", "a")
    else:
        ca, own = documented_certificates(tmp_path)
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        listening(own) as host,
        socket.create_connection(("127.0.0.1", host.port)) as plain,
        context.wrap_socket(plain, server_hostname="a"),
    ):
        pass


def test_a_host_with_a_certificate_of_its_name_is_asked_wherever_it_is(
    cluster: Cluster, credentials: Credentials
) -> None:
    """Its name counts, not its address: a host may have another one tomorrow."""
    with listening(credentials.certificate("10.9.9.9", "a")) as host:
        announced(cluster, "a", f"https://127.0.0.1:{host.port}")
        assert row(manager(cluster, credentials.ca), "a").reason is None
        assert f"Authorization: Bearer {TOKEN}".encode() in host.heard


def test_one_untrusted_host_holds_up_nothing_that_others_can_do(
    cluster: Cluster, credentials: Credentials
) -> None:
    """Nothing was sent to it, so the next one may be asked."""
    announced(cluster, "a", "http://10.9.9.9:7480")
    client = manager(cluster, credentials.ca)
    for name in ("b", "c"):
        cluster.kill(name)
    with pytest.raises(UntrustedError):
        client.create_volume("v", pool="shared", size=1 << 20)
    cluster.revive("c")
    client.create_volume("v", pool="shared", size=1 << 20)
    assert client.attach("v").host == "c"
    # c is the busier one now, so a would be the first.
    client.create_volume("w", pool="shared", size=1 << 20)
    assert client.attach("w", take_over=True).host == "c"


@pytest.mark.parametrize("url", ["http://127.0.0.1:7480", "http://[::1]:7480", "https://10.0.0.1:7480"])
def test_without_an_authority_this_machine_is_trusted(url: str) -> None:
    check_url("a", url, ca=None)


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1:7480",
        "http://127.evil.example:7480",
        "http://localhost:7480",
        "http://127.0.0.1@evil.example:7480",
        "http://[fd00::1]:7480",
        "ftp://127.0.0.1:7480",
        "127.0.0.1:7480",
        "https://",
        "http://[",
        "",
    ],
)
def test_beyond_this_machine_it_takes_tls(url: str) -> None:
    with pytest.raises(UntrustedError, match="host 'a'"):
        check_url("a", url, ca=None)


def test_with_an_authority_it_always_takes_tls(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError, match="gateway_ca"):
        check_url("a", "http://127.0.0.1:7480", ca=tmp_path / "ca.pem")


# a token for each gateway


def own_tokens(cluster: Cluster, folder: Path, **tokens: str) -> Path:
    """A directory with a token for each host that is named."""
    folder.mkdir(mode=0o700)
    for name, token in tokens.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(f"{token}\n")
    return folder


def test_each_gateway_is_shown_its_own_token(
    cluster: Cluster, credentials: Credentials, tmp_path: Path
) -> None:
    """All gateways had one token, so whoever was root on one host could do everything on all."""
    with listening(credentials.certificate("127.0.0.1", "a")) as a:
        announced(cluster, "a", f"https://127.0.0.1:{a.port}")
        folder = own_tokens(cluster, tmp_path / "tokens", a="1" * 32)
        client = cluster.client(
            cluster.operations({"a": connector(credentials.ca)}, GatewayTokens(cluster.token_file, folder))
        )
        reasons = {host.name: host.reason for host in client.hosts()}
        # Those without one of their own have the common one.
        assert reasons == {"a": None, "b": None, "c": None}
        assert ("1" * 32).encode() in a.heard
        assert TOKEN.encode() not in a.heard


def test_a_gateway_without_a_token_is_not_asked(cluster: Cluster, tmp_path: Path) -> None:
    folder = own_tokens(cluster, tmp_path / "tokens", a=TOKEN, b="2" * 32)
    client = cluster.client(cluster.operations(tokens=GatewayTokens(None, folder)))
    assert row(client, "a").reason is None
    told = row(client, "b").reason
    assert told is not None
    assert str(folder / "b") in told
    told = row(client, "c").reason
    assert told is not None
    assert str(folder / "c") in told
    assert "GET /v1/health" not in cluster.hosts["c"].transport.asked
    # What others can do, they do.
    cluster.kill("b")
    client.create_volume("v", pool="shared", size=1 << 20)
    assert cluster.hosts["a"].transport.asked[-1] == "POST /v1/volumes"
    # Read each time, so that a host is added without a restart.
    (folder / "c").touch(mode=0o600)
    (folder / "c").write_text(f"{TOKEN}\n")
    assert row(client, "c").reason is None


def test_a_hosts_name_is_no_path(cluster: Cluster, tmp_path: Path) -> None:
    """Names come from etcd, where anybody who writes may have any file taken for a token."""
    own_tokens(cluster, tmp_path / "tokens", a=TOKEN)
    (tmp_path / "secret").touch(mode=0o600)
    (tmp_path / "secret").write_text("s" * 32)
    tokens = GatewayTokens(None, tmp_path / "tokens")
    for name in ("../secret", "..", ".", "", str(tmp_path / "secret"), "a/../../secret", "a\0"):
        with pytest.raises(UntrustedError, match="no name"):
            tokens.of(name)


def test_a_directory_of_tokens_is_looked_at_first(cluster: Cluster, tmp_path: Path) -> None:
    folder = own_tokens(cluster, tmp_path / "tokens", a=TOKEN, b="short")
    with pytest.raises(InvalidError, match="b has no good token"):
        GatewayTokens(None, folder).check()
    (folder / "b").unlink()
    GatewayTokens(None, folder).check()
    with pytest.raises(NoDeviceError, match="gateway_token_dir"):
        GatewayTokens(None, tmp_path / "nowhere").check()
    folder.chmod(0o707)
    with pytest.raises(InvalidError, match="chmod o="):
        GatewayTokens(None, folder).check()


def test_an_answer_that_says_untrusted_was_sent_for_all_that(cluster: Cluster) -> None:
    """Only what was never sent may be asked of another host: a gateway that answers with this word has the request."""
    answered = httpx2.MockTransport(
        lambda request: httpx2.Response(403, json={"code": "untrusted", "message": "No."})
    )

    def connect(host: str, url: str, token: str, timeout: float) -> RemoteClient:
        return RemoteClient(url, token=token, transport=answered)

    client = cluster.client(cluster.operations({"b": connect}))
    cluster.kill("a")
    with pytest.raises(UntrustedError, match="No"):
        client.create_volume("v", pool="shared", size=1 << 20)
    assert "POST /v1/volumes" not in cluster.hosts["c"].transport.asked
