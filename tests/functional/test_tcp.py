"""A gateway's API over TCP: beside its Unix socket, for bearers of a token, and not lost by an upgrade."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from ringstone.client import RemoteClient
from ringstone.errors import UnauthorizedError, UnreachableError
from ringstone.lab.process import free_ports
from tests.framework.gateway import GatewayProcess
from tests.framework.lab import wait_for
from tests.framework.load import verify

TOKEN = "t" * 32


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(f"# of the managers\n{TOKEN}\n")
    return path


@pytest.fixture
def served(token_file: Path) -> Iterator[tuple[GatewayProcess, str]]:
    """On this machine's own address, where it takes no TLS."""
    address = f"127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
    with GatewayProcess("--listen", address, "--token-file", str(token_file)) as gateway:
        yield gateway.start(), f"http://{address}"


def test_only_the_bearer_of_a_token_is_answered(served: tuple[GatewayProcess, str]) -> None:
    gateway, url = served
    with RemoteClient(url, token=TOKEN) as client:
        assert client.info().pid == gateway.pid
        gateway.make_pool("memory")
        client.create_volume("v", pool="pool", size=1 << 20)
    # The Unix socket needs none, as before.
    with gateway.client() as client:
        assert [volume.name for volume in client.volumes()] == ["v"]
    for wrong in ("", "x" * 32, TOKEN[:-1], TOKEN + "t"):
        with RemoteClient(url, token=wrong) as client, pytest.raises(UnauthorizedError, match="token"):
            client.delete_volume("v")
    with gateway.client() as client:
        assert [volume.name for volume in client.volumes()] == ["v"]


def test_an_upgrade_keeps_it(served: tuple[GatewayProcess, str]) -> None:
    gateway, url = served
    with RemoteClient(url, token=TOKEN) as client:
        assert client.info().upgrade is None
        gateway.upgrade()
        assert client.info().pid == gateway.pid
        assert client.info().upgrade is not None


def test_a_token_is_changed_without_a_restart(served: tuple[GatewayProcess, str], token_file: Path) -> None:
    _, url = served
    new = "n" * 32
    with RemoteClient(url, token=TOKEN) as old, RemoteClient(url, token=new) as client:
        token_file.write_text(f"{TOKEN}\n{new}\n")
        assert client.info().pid == old.info().pid
        token_file.write_text(f"{new}\n")
        assert client.info()
        with pytest.raises(UnauthorizedError):
            old.info()


def test_a_token_ends_with_its_file_though_nobody_asks(
    served: tuple[GatewayProcess, str], token_file: Path
) -> None:
    """Nobody was told, and the token was good for some seconds from the next request on, whenever that came."""
    gateway, url = served
    token_file.unlink()
    with gateway.client() as local:
        wait_for(
            "the end of the tokens",
            lambda: any("admitted over TCP any more: " in event.message for event in local.events()),
        )
    with RemoteClient(url, token=TOKEN) as client, pytest.raises(UnauthorizedError):
        client.info()


def test_the_command_line_uses_it(served: tuple[GatewayProcess, str], token_file: Path) -> None:
    gateway, url = served
    options = {"RINGSTONE_MANAGER": url, "RINGSTONE_TOKEN_FILE": str(token_file)}
    import subprocess

    from tests.framework.gateway import RINGSTONE

    def run(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        environment = gateway.environment(**(options | more))
        return subprocess.run(
            [*RINGSTONE, *words], env=environment, capture_output=True, text=True, check=False
        )

    assert run("volume", "list").returncode == 0
    assert "process" in run("status").stdout
    hosts = run("host", "list")
    assert (hosts.returncode, "not part of this API" in hosts.stderr) == (3, True)
    wrong = run("volume", "list", RINGSTONE_TOKEN_FILE="", RINGSTONE_TOKEN="x" * 32)
    assert (wrong.returncode, "refuses" in wrong.stderr) == (14, True)
    # What is on the command line counts more than the environment.
    nowhere = run("--socket", "/nowhere.sock", "volume", "list")
    assert (nowhere.returncode, "/nowhere.sock" in nowhere.stderr) == (7, True)
    both = run("--manager", url, "--socket", "/nowhere.sock", "volume", "list")
    assert both.returncode == 2


def test_what_is_wrong_is_told_before_anything_is_served(
    served: tuple[GatewayProcess, str], token_file: Path
) -> None:
    _, url = served
    address = url.removeprefix("http://")
    cases = [
        (("--listen", address, "--token-file", str(token_file)), "Address already in use"),
        (("--listen", "127.0.0.1:1"), "set token_file"),
        (("--listen", "10.0.0.1:1", "--token-file", str(token_file)), "tls_cert"),
        (("--listen", "127.0.0.1:1", "--token-file", "/nowhere"), "/nowhere"),
        (
            (
                *("--listen", "127.0.0.1:1", "--token-file", str(token_file)),
                *("--tls-cert", str(token_file), "--tls-key", str(token_file)),
            ),
            "no certificate and its key",
        ),
    ]
    for flags, told in cases:
        with GatewayProcess(*flags) as other:
            done = other.run_to_end()
            assert done.returncode not in (0, 1), done.stderr
            assert told in done.stderr
            assert not other.socket.exists()


def test_a_gateway_that_is_not_there_is_told(token_file: Path) -> None:
    port = free_ports("127.0.0.1", 1)[0]
    with (
        RemoteClient(f"http://127.0.0.1:{port}", token=TOKEN) as client,
        pytest.raises(UnreachableError, match="does not answer") as told,
    ):
        client.info()
    assert not told.value.sent


class FewDescriptors(GatewayProcess):
    """A gateway that may have 300 descriptors."""

    def command(self) -> list[str]:
        return ["prlimit", "--nofile=300:300", *super().command()]


def test_strangers_keep_no_guest_from_its_disk(token_file: Path) -> None:
    """400 connections without a token took all descriptors there were, so that no frontend could connect."""
    port = free_ports("127.0.0.1", 1)[0]
    flags = ("--listen", f"127.0.0.1:{port}", "--token-file", str(token_file))
    with ExitStack() as stack:
        gateway = stack.enter_context(FewDescriptors(*flags)).start()
        attachment = gateway.serve("v", size=1 << 20)
        for _ in range(400):
            stranger = stack.enter_context(socket.socket())
            stranger.setblocking(False)
            with suppress(BlockingIOError):
                stranger.connect(("127.0.0.1", port))
        with RemoteClient(f"http://127.0.0.1:{port}", token=TOKEN) as client:
            assert client.info().pid == gateway.pid
        descriptors = len(list(Path(f"/proc/{gateway.pid}/fd").iterdir()))
        assert descriptors < 120
        verify(attachment.socket, operations=200)
