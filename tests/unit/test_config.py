"""The gateway's configuration: file, flags, defaults, and what is refused."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import InvalidError, NoDeviceError
from ringstone.gateway import config as module
from ringstone.gateway.config import GatewayConfig, load_config, parse_cores
from ringstone.gateway.rights import SocketRights
from ringstone.state.settings import EtcdSettings

LAST = max(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def no_host_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The machine's own file must not reach the tests."""
    path = tmp_path / "etc.toml"
    monkeypatch.setattr(module, "DEFAULT_CONFIG", path)
    return path


def load(tmp_path: Path, text: str, **flags: Any) -> GatewayConfig:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return load_config(path, flags)


def test_the_defaults_need_no_file() -> None:
    config = load_config(None, {})
    assert config == GatewayConfig(
        cores=(LAST,),
        idle_us=200,
        state_dir=Path("/var/lib/ringstone"),
        run_dir=Path("/run/ringstone"),
        socket=Path("/run/ringstone/gateway.sock"),
        log_level="info",
    )
    assert config.database == Path("/var/lib/ringstone/ringstone.db")
    assert config.stats_path == Path("/run/ringstone/stats")


def test_the_state_may_be_in_etcd(tmp_path: Path) -> None:
    assert (load(tmp_path, "").etcd, load(tmp_path, "").host) == (None, "localhost")
    text = """
        [gateway]
        etcd = ["https://10.0.0.1:2379", "https://10.0.0.2:2379/"]
        etcd_ca = "/ca.pem"
        etcd_cert = "/cert.pem"
        etcd_key = "/key.pem"
        etcd_user = "ringstone"
        etcd_password_file = "/password"
        etcd_prefix = "/r/"
    """
    config = load(tmp_path, text)
    assert config.host == socket.gethostname()
    assert config.etcd == EtcdSettings(
        ("https://10.0.0.1:2379", "https://10.0.0.2:2379"),
        ca=Path("/ca.pem"),
        cert=Path("/cert.pem"),
        key=Path("/key.pem"),
        user="ringstone",
        password_file=Path("/password"),
        prefix="/r/",
    )
    flags = load(tmp_path, text, etcd="https://a:1, https://b:2", host="alpha")
    assert flags.host == "alpha"
    assert flags.etcd is not None
    assert flags.etcd.endpoints == ("https://a:1", "https://b:2")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('etcd = "10.0.0.1:2379"', "no member's URL"),
        ('etcd = "http://10.0.0.1"', "no member's URL"),
        ('etcd = "http://a:x"', "no member's URL"),
        ("etcd = []", "names no member"),
        ("etcd = [1]", "a list of URLs"),
        ('etcd = "http://a:1"\netcd_prefix = "r"', "etcd_prefix is 'r'"),
        ('etcd = "http://a:1"\netcd_cert = "/c"', "belong together"),
        ('etcd = "http://a:1"\netcd_user = "u"', "belong together"),
        (
            'etcd = "http://a:1"\netcd_user = "u"\netcd_password_file = "/p"',
            "with a password but without TLS",
        ),
        ('etcd = "http://a:1"\netcd_ca = "c"', "not an absolute path"),
        ('host = "a b"', "is not a host name"),
    ],
)
def test_wrong_words_for_etcd_are_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        load(tmp_path, f"[gateway]\n{setting}\n")


def test_the_hosts_file_is_read_where_it_exists(no_host_config: Path) -> None:
    no_host_config.write_text("[gateway]\nidle_us = 7\n")
    assert load_config(None, {}).idle_us == 7


def test_a_file_sets_everything_and_flags_override_it(tmp_path: Path) -> None:
    text = f"""
        [gateway]
        cores = [{LAST}]
        idle_us = 50
        state_dir = "/s"
        run_dir = "/r"
        socket = "/x.sock"
        log_level = "debug"
        backing_wait_s = 5
        socket_dirs = ["/a", "/b/c"]
    """
    config = load(tmp_path, text)
    assert config == GatewayConfig(
        (LAST,),
        50,
        Path("/s"),
        Path("/r"),
        Path("/x.sock"),
        "debug",
        5,
        socket_dirs=(Path("/a"), Path("/b/c")),
    )
    given = load(tmp_path, text + 'socket_owner = "libvirt-qemu"\nsocket_group = "kvm"', socket_mode="0660")
    assert given.socket_rights == SocketRights("libvirt-qemu", "kvm", "0660")
    assert load(tmp_path, text, socket_dirs="/d, /e").socket_dirs == (Path("/d"), Path("/e"))
    config = load(tmp_path, text, idle_us=0, socket="/y.sock", state_dir=None, cores=str(LAST))
    assert (config.idle_us, config.socket, config.state_dir) == (0, Path("/y.sock"), Path("/s"))


def test_the_socket_follows_the_run_directory(tmp_path: Path) -> None:
    assert load(tmp_path, '[gateway]\nrun_dir = "/r"\n').socket == Path("/r/gateway.sock")


def test_the_shipped_example_is_valid() -> None:
    example = Path(__file__).resolve().parents[2] / "deploy/gateway.toml"
    assert load_config(example, {"cores": str(LAST)}).run_dir == Path("/run/ringstone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gateway", "is not TOML"),
        ("[gateways]\n", "gateways is no table"),
        ("[gateway]\ncore = [1]\n", "core is no setting"),
        ('[gateway]\nidle_us = "1"\n', "idle_us"),
        ("[gateway]\nidle_us = -1\n", "idle_us"),
        ("[gateway]\nidle_us = true\n", "idle_us is True"),
        ("[gateway]\nsocket_mode = 0o660\n", 'socket_mode is 432, not a string such as "0660"'),
        ('[gateway]\nsocket_dirs = ["a"]\n', "socket_dirs is 'a', not an absolute path"),
        ("[gateway]\nsocket_dirs = 1\n", "socket_dirs is 1, not a list of directories"),
        ("[gateway]\nbacking_wait_s = 0.5\n", "backing_wait_s is 0.5, not a whole number"),
        ("gateway = 1\n", "is no table"),
        ("[gateway]\nsocket = 1\n", "socket is 1, not a string"),
        ("[gateway]\ncores = [true]\n", "a list of CPU numbers"),
        ("[gateway]\ncores = []\n", "at least one CPU"),
        ("[gateway]\ncores = [0, 0]\n", "only once"),
        ("[gateway]\ncores = [4095]\n", "may not use CPU 4095"),
        ('[gateway]\ncores = "a"\n', "not a list of CPUs"),
        ('[gateway]\nrun_dir = "r"\n', "not an absolute path"),
        ('[gateway]\nlog_level = "loud"\n', "not a log level"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        load(tmp_path, text)


def test_what_is_wrong_in_a_flag_is_named() -> None:
    with pytest.raises(InvalidError, match="A flag is not valid: idle_us is -1, not a whole number"):
        load_config(None, {"idle_us": -1})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NoDeviceError, match=r"missing\.toml"):
        load_config(tmp_path / "missing.toml", {})


def test_cores_are_read_as_lists_and_ranges() -> None:
    assert parse_cores("1") == [1]
    assert parse_cores("1, 4-6,9") == [1, 4, 5, 6, 9]
    for text in ("", ",", "a", "1-", "3-2"):
        with pytest.raises(InvalidError):
            parse_cores(text)
