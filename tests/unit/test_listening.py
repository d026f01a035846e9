"""Where an API is served over TCP: settings that are refused, certificates, and tokens."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import InvalidError, NoDeviceError, RingstoneError
from ringstone.lab.credentials import Credentials
from ringstone.listening import TOKEN_GRACE_SECONDS, Tokens, listening_of, read_tokens
from ringstone.manager import config as module
from ringstone.manager.config import load_config
from ringstone.state.etcd_client import EtcdClient
from ringstone.state.settings import EtcdSettings

GOOD = {"token_file": "/token", "tls_cert": "/cert", "tls_key": "/key"}


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({"listen": "10.0.0.1:7480"}, "https://10.0.0.1:7480"),
        ({"listen": "[fd00::1]:7480"}, "https://[fd00::1]:7480"),
        ({"listen": "127.0.0.1:1", "tls_cert": None, "tls_key": None}, "http://127.0.0.1:1"),
        ({"listen": "[::1]:1", "tls_cert": None, "tls_key": None}, "http://[::1]:1"),
        (
            {"listen": "10.0.0.1:1", "tls_cert": None, "tls_key": None, "insecure": True},
            "http://10.0.0.1:1",
        ),
        (
            {"listen": "0.0.0.0:7480", "advertise": "https://host-a.example:7480"},
            "https://host-a.example:7480",
        ),
    ],
)
def test_others_are_told_a_url(settings: dict[str, Any], url: str) -> None:
    found = listening_of(GOOD | settings)
    assert found is not None
    assert found.url == url
    assert found.where == settings["listen"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"listen": "10.0.0.1"}, "listen"),
        ({"listen": "host-a:7480"}, "numeric"),
        ({"listen": "10.0.0.1:0"}, "listen"),
        ({"listen": "10.0.0.1:65536"}, "listen"),
        ({"listen": "fd00::1:7480"}, "listen"),
        ({"token_file": None}, "set token_file"),
        ({"token_file": "token"}, "token_file"),
        ({"tls_key": None}, "tls_cert and tls_key"),
        ({"tls_cert": None, "tls_key": None}, "Set tls_cert and tls_key; or insecure"),
        ({"listen": "0.0.0.0:7480"}, "set advertise"),
        ({"advertise": "host-a"}, "advertise"),
        ({"advertise": "https://host-a/x"}, "advertise"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidError, match=named):
        listening_of({"listen": "10.0.0.1:7480"} | GOOD | settings)


def test_nothing_is_served_unless_it_is_asked_for() -> None:
    assert listening_of({}) is None
    assert listening_of(GOOD) is None


def test_files_are_looked_at_before_anything_depends_on_them(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path / "c")
    one, other = credentials.certificate("10.0.0.1"), credentials.certificate("10.0.0.2")

    def check(**changed: Any) -> None:
        settings = {
            "listen": "10.0.0.1:7480",
            "token_file": str(credentials.token_file),
            "tls_cert": str(one.cert),
            "tls_key": str(one.key),
        }
        found = listening_of(settings | changed)
        assert found is not None
        found.check()

    check()
    with pytest.raises(InvalidError, match="no certificate and its key"):
        check(tls_key=str(other.key))
    with pytest.raises(NoDeviceError, match="/nowhere"):
        check(tls_cert="/nowhere")
    with pytest.raises(NoDeviceError, match="token file"):
        check(token_file="/nowhere")
    one.key.chmod(0o604)
    with pytest.raises(InvalidError, match=f"chmod o= {one.key}"):
        check()


def token_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", ["", "# only a comment\n", "short\n", "é" * 32, "t" * 32 + "\nshort\n"])
def test_a_file_without_good_tokens_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidError, match="openssl rand"):
        Tokens(token_file(tmp_path, text), report=print)


def test_a_file_that_everybody_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="chmod"):
        read_tokens(token_file(tmp_path, "t" * 32, 0o644))


def test_secrets_for_etcd_that_everybody_reads_are_refused(tmp_path: Path) -> None:
    """Keys and passwords were taken from files that every user of the host could read."""
    credentials = Credentials(tmp_path / "c")
    certificate = credentials.certificate("10.0.0.1")
    password = tmp_path / "password"
    password.touch(mode=0o604)
    password.write_text("secret\n")
    where = ("https://10.0.0.1:1",)
    with pytest.raises(InvalidError, match=f"chmod o= {password}"):
        EtcdClient(EtcdSettings(where, user="u", password_file=password, total_s=0.1))
    certificate.key.chmod(0o640)
    tls = EtcdSettings(where, ca=credentials.ca, cert=certificate.cert, key=certificate.key, total_s=0.1)
    EtcdClient(tls).close()
    certificate.key.chmod(0o604)
    with pytest.raises(InvalidError, match=f"chmod o= {certificate.key}"):
        EtcdClient(tls)


@pytest.mark.parametrize(
    "endpoints",
    [
        ("http://10.0.0.1:2379",),
        ("https://10.0.0.1:2379", "http://10.0.0.2:2379"),
        ("http://127.evil.example:2379",),
        ("http://localhost:2379",),
        ("http://[fd00::1]:2379",),
    ],
)
def test_etcds_password_goes_over_no_http(endpoints: tuple[str, ...]) -> None:
    """`listen` was refused without TLS, but the password of etcd, with which all of the state can be changed, went over
    any network as it was."""
    with pytest.raises(InvalidError, match=r"everybody on the way reads it.*https"):
        EtcdSettings(endpoints, user="u", password_file=Path("/password"))
    # Without a password there is nothing to be read.
    EtcdSettings(endpoints)


def test_etcds_password_goes_over_this_machines_http() -> None:
    EtcdSettings(
        ("http://127.0.0.1:2379", "http://[::1]:2379", "https://10.0.0.1:2379"),
        user="u",
        password_file=Path("/password"),
    )


def test_each_line_is_a_token(tmp_path: Path) -> None:
    old, new = "o" * 32, "n" * 32
    path = token_file(tmp_path, f"# old\n{old}\n\n  {new}  \n")
    assert read_tokens(path) == [old, new]
    tokens = Tokens(path, report=print)
    assert [tokens.admit(one) for one in (old, new, "", "# old", old[:-1], f"{old}\n{new}", "é")] == [
        "change",
        "change",
        *[None] * 5,
    ]


@pytest.mark.parametrize(
    "spoil", [os.remove, lambda path: path.write_text(""), lambda path: path.chmod(0o644)]
)
def test_tokens_of_a_file_that_is_no_good_are_in_force_for_seconds(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """They once were until the end of the process, and nobody was told."""
    path = token_file(tmp_path, "o" * 32)
    told: list[str] = []
    now = [100.0]
    tokens = Tokens(path, report=told.append, clock=lambda: now[0])
    spoil(path)
    assert tokens.admit("o" * 32)
    assert len(told) == 1
    assert str(path) in told[0]
    now[0] += TOKEN_GRACE_SECONDS
    assert not tokens.admit("o" * 32)
    assert not tokens.admit("o" * 32)
    assert len(told) == 2
    path.unlink(missing_ok=True)
    token_file(tmp_path, "n" * 32)
    assert (tokens.admit("n" * 32), tokens.admit("o" * 32)) == ("change", None)


def test_the_seconds_do_not_wait_for_a_request(tmp_path: Path) -> None:
    """They began with the first request after the file had gone, so its tokens were good until somebody asked."""
    path = token_file(tmp_path, "o" * 32)
    told: list[str] = []
    now = [100.0]
    tokens = Tokens(path, report=told.append, clock=lambda: now[0])
    path.unlink()
    tokens.look()
    now[0] += TOKEN_GRACE_SECONDS
    assert not tokens.admit("o" * 32)
    assert len(told) == 2


def test_a_file_may_be_replaced_in_steps(tmp_path: Path) -> None:
    path = token_file(tmp_path, "o" * 32)
    told: list[str] = []
    now = [100.0]
    tokens = Tokens(path, report=told.append, clock=lambda: now[0])
    for spoil in (lambda: path.write_text("bad"), lambda: os.remove(path)):
        spoil()
        assert tokens.admit("o" * 32)
    token_file(tmp_path, "n" * 32)
    now[0] += 10 * TOKEN_GRACE_SECONDS
    assert (tokens.admit("n" * 32), tokens.admit("o" * 32)) == ("change", None)
    assert len(told) == 1


# the manager's configuration

MANAGER = """
[manager]
token_file = "/clients"
gateway_token_file = "/gateways"
etcd = ["http://10.0.0.1:2379/", "http://10.0.0.2:2379"]
"""


@pytest.fixture(autouse=True)
def no_host_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's own file must not reach the tests."""
    monkeypatch.setattr(module, "DEFAULT_CONFIG", tmp_path / "nowhere.toml")


def test_a_manager_needs_etcd_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "manager.toml"
    path.write_text(MANAGER)
    config = load_config(path, {})
    assert config.etcd == EtcdSettings(("http://10.0.0.1:2379", "http://10.0.0.2:2379"))
    assert (config.listening.where, config.failover_grace_s) == ("127.0.0.1:7481", 0.0)
    assert load_config(path, {"failover": False}).failover_grace_s is None
    assert load_config(path, {"failover_grace_s": 30.0}).failover_grace_s == 30
    for missing in ("token_file", "gateway_token_file", "etcd"):
        path.write_text("\n".join(line for line in MANAGER.splitlines() if not line.startswith(missing)))
        with pytest.raises(InvalidError, match=missing):
            load_config(path, {})
    with pytest.raises(InvalidError, match="etcd is not set"):
        load_config(None, {})


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("etdc = 1", "etdc is no setting"),
        ("failover = 1", "failover is 1, not true or false"),
        ("failover_grace_s = -1", "failover_grace_s"),
        ('gateway_ca = "ca.pem"', "absolute"),
        ('log_level = "loud"', "log level"),
        ('listen = "10.0.0.1:7481"', "without TLS"),
        ("[gateway]", "gateway is no table"),
        ("what", "not valid"),
    ],
)
def test_a_managers_mistake_is_named(tmp_path: Path, more: str, named: str) -> None:
    path = tmp_path / "manager.toml"
    path.write_text(f"{MANAGER}\n{more}\n")
    with pytest.raises(RingstoneError, match=named):
        load_config(path, {})


def test_the_example_is_valid() -> None:
    example = Path(__file__).resolve().parents[2] / "deploy/manager.toml"
    assert load_config(example, {}).failover_grace_s == 0
