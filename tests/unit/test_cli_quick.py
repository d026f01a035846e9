"""The short way to `ringstone gateway` understands what the real command does, and nothing differently."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import typer.main

from ringstone.cli import gateway as command_module
from ringstone.cli.app import app
from ringstone.cli.quick import GatewayFlags, gateway_flags

EVERYTHING = [
    *("--config", "a.toml", "--cores", "1,4-5", "--idle-us=7", "--state-dir", "s", "--run-dir=/r"),
    *("--log-level", "debug", "--backing-wait-s", "3", "--supervise", "--allow-test-pools"),
    *(
        "--socket-dirs",
        "/run/vms,/srv",
        "--takeover",
        "--no-balance",
        "--host",
        "alpha",
        "--etcd=http://a:1,http://b:2",
        "--etcd-ca",
        "ca.pem",
    ),
    *("--etcd-cert=cert.pem", "--etcd-key", "key.pem", "--etcd-user", "ringstone"),
    *(
        "--etcd-password-file",
        "password",
        "--etcd-prefix",
        "/r/",
        "--listen",
        "127.0.0.1:1",
        "--tls-cert=c.pem",
    ),
    *("--tls-key", "k.pem", "--token-file", "token", "--advertise", "https://a:1", "--insecure"),
    *("--socket-owner", "libvirt-qemu", "--socket-group=kvm", "--socket-mode", "0660"),
]


@pytest.fixture(autouse=True)
def no_socket_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGSTONE_SOCKET", raising=False)


def slow(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> GatewayFlags:
    """What the real command makes of it."""
    started: list[GatewayFlags] = []
    monkeypatch.setattr(command_module, "start_gateway", started.append)
    app(list(arguments), prog_name="ringstone", standalone_mode=False)
    return started[0]


@pytest.mark.parametrize(
    "arguments",
    [["gateway"], ["gateway", *EVERYTHING], ["--socket", "x.sock", "gateway", "--cores", "1"]],
    ids=["nothing", "everything", "socket"],
)
def test_both_ways_understand_the_same(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    quick = gateway_flags(arguments)
    assert quick is not None
    assert quick == slow(arguments, monkeypatch)


def test_every_option_of_the_command_is_known() -> None:
    command: Any = typer.main.get_command(app)
    options = {option for one in command.commands["gateway"].params for option in one.opts}
    assert {word.partition("=")[0] for word in EVERYTHING if word.startswith("--")} == options


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pool", "list"],
        ["--json", "gateway"],
        ["gateway", "--help"],
        ["gateway", "stray"],
        ["gateway", "--cores"],
        ["gateway", "--idle-us", "many"],
        ["gateway", "--idle_us", "1"],
        ["gateway", "--no-such"],
        ["gateway", "--supervise=yes"],
    ],
)
def test_whatever_else_is_left_to_the_command(arguments: list[str]) -> None:
    assert gateway_flags(arguments) is None


def test_a_socket_from_the_environment_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGSTONE_SOCKET", "/x.sock")
    assert gateway_flags(["gateway"]) is None


def test_serving_imports_none_of_the_slow_libraries() -> None:
    """A killed gateway took 0.55 s to serve again, 0.45 of them for libraries that only its API needs."""
    code = (
        "import sys; sys.argv = ['ringstone', 'gateway', '--cores', '4095']\n"
        "from ringstone.cli import main\n"
        "import ringstone.gateway.daemon\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted({'typer', 'pydantic', 'fastapi', 'uvicorn', 'httpx2', 'rich', 'asyncio'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "may not use CPU 4095" in done.stderr
    assert done.stdout.split() == []
