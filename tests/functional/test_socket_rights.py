"""Sockets of volumes that belong to somebody else than the gateway: a hypervisor that is not root."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ringstone import models
from ringstone.client import GatewayClient
from ringstone.errors import InvalidError, StorageError
from ringstone.gateway.rights import SocketRights
from tests.framework.gateway import GatewayProcess

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="Giving a file away takes root.")

MIB = 1 << 20
OWNER, GROUP, STRANGER = 64001, 64002, 64003
OTHERS = ("--socket-owner", str(OWNER), "--socket-group", str(GROUP), "--socket-mode", "0660")

# Tries to connect for as long as its standard input is open, and prints how often it was let in. It says so when it has
# begun. The socket's directory is its argument, as it cannot see the way there.
_INTRUDER = """
import os, select, socket, sys
os.chdir(sys.argv[1])
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2]))
let_in = tried = 0
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        one.setblocking(False)
        let_in += one.connect_ex(sys.argv[4]) == 0
        tried += 1
print(let_in, tried, flush=True)
"""


@contextmanager
def trying(path: Path, user: int, group: int) -> Iterator[list[int]]:
    """Somebody who tries to connect all the time; how often they were let in, and how often they tried, at the end."""
    outcome: list[int] = []
    command = [sys.executable, "-c", _INTRUDER, str(path.parent), str(user), str(group), path.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "begun\n"
            yield outcome
        finally:
            process.stdin.close()
            outcome += [int(word) for word in process.stdout.read().split()]


def may_connect(path: Path, user: int, group: int) -> bool:
    code = _INTRUDER.replace("while not select.select([sys.stdin], [], [], 0)[0]:", "for _ in range(1):")
    command = [sys.executable, "-c", code, str(path.parent), str(user), str(group), path.name]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return done.stdout.split() == ["begun", "1", "1"]


def rights_of(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


def made(client: GatewayClient, *volumes: str) -> None:
    for volume in volumes:
        client.create_volume(volume, pool="memory", size=MIB)


def test_a_socket_stays_whose_it_is(gateway: GatewayProcess) -> None:
    """Over a crash, a stop, a hot upgrade, and until it is attached for somebody else."""
    gateway.make_pool("memory", "memory")
    with gateway.client() as client:
        made(client, "v")
    attached = gateway.cli_json("volume", "attach", "v", *OTHERS)
    path = Path(attached["socket"])
    assert attached["socket_rights"] == f"{OWNER}:{GROUP} 0660"
    assert rights_of(path) == (OWNER, GROUP, 0o660)
    assert f"v.sock, {OWNER}:{GROUP} 0660" in gateway.cli("volume", "show", "v").stdout
    gateway.kill()
    gateway.start()
    assert rights_of(path) == (OWNER, GROUP, 0o660)
    gateway.restart()
    assert rights_of(path) == (OWNER, GROUP, 0o660)
    file = path.stat().st_ino
    gateway.upgrade()
    assert (rights_of(path), path.stat().st_ino) == ((OWNER, GROUP, 0o660), file)
    assert may_connect(path, OWNER, STRANGER)
    gateway.cli("volume", "detach", "v")
    gateway.cli("volume", "attach", "v", "--socket-group", str(GROUP))
    assert rights_of(path) == (0, GROUP, 0o660)
    gateway.cli("volume", "detach", "v")
    gateway.cli("volume", "attach", "v")
    assert rights_of(path) == (0, os.getegid(), 0o600)


def test_owner_and_group_may_connect_and_nobody_else() -> None:
    with GatewayProcess(*OTHERS) as gateway:
        gateway.start()
        path = Path(gateway.serve("v").socket)
        assert rights_of(path) == (OWNER, GROUP, 0o660)
        assert may_connect(path, OWNER, STRANGER)
        assert may_connect(path, STRANGER, GROUP)
        assert not may_connect(path, STRANGER, STRANGER)
        # What an attachment says itself comes first.
        with gateway.client() as client:
            made(client, "own")
            own = Path(client.attach("own", socket_owner=str(STRANGER), socket_mode="0600").socket)
        assert rights_of(own) == (STRANGER, GROUP, 0o600)
        assert may_connect(own, STRANGER, STRANGER)
        assert not may_connect(own, OWNER, GROUP)


@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.soak)])
def test_there_is_no_moment_at_which_others_may_connect(gateway: GatewayProcess, rounds: int) -> None:
    """The socket is bound, given away, and only then listens: before that every connection is refused. A mode that is
    set once it listens would come too late for one who tries all the time."""
    gateway.make_pool("memory", "memory")
    with gateway.client() as client:
        made(client, "v")
        path = Path(client.attach("v").socket)
        client.detach("v")
        with trying(path, STRANGER, GROUP) as of_the_group, trying(path, OWNER, STRANGER) as of_none:
            for _ in range(rounds):
                client.attach("v", socket_owner=str(OWNER), socket_group=str(GROUP), socket_mode="0600")
                client.detach("v", force=True)
        assert of_the_group[0] == 0 < of_the_group[1]
        assert of_none[0] > 0


def test_unknown_names_are_told_at_once_and_leave_nothing(gateway: GatewayProcess) -> None:
    gateway.make_pool("memory", "memory")
    with gateway.client() as client:
        made(client, "v")
        for rights in (SocketRights("nobody-there"), SocketRights(group="none"), SocketRights(mode="0666")):
            request = models.AttachmentCreate(
                volume="v",
                socket_owner=rights.owner,
                socket_group=rights.group,
                socket_mode=rights.mode,
            )
            with pytest.raises(InvalidError):
                client.create_attachment(request)
        assert client.attachments() == []
    assert not list((gateway.run_dir).glob("vhost/*"))
    gateway.stop()
    # Of all sockets: before anything is served, and an upgrade leaves the old gateway as it is.
    refused = gateway.run_to_end("--socket-owner", "nobody-there")
    assert refused.returncode == 5
    assert "no user 'nobody-there' on this host" in refused.stderr
    gateway.start()


class Confined(GatewayProcess):
    """Root without the right to give files away, as a unit of a release before leaves it."""

    def command(self) -> list[str]:
        return ["setpriv", "--bounding-set", "-chown", *super().command()]


def test_what_cannot_be_given_away_is_told_with_the_remedy_and_leaves_nothing() -> None:
    with Confined() as gateway:
        gateway.start()
        gateway.make_pool("memory", "memory")
        with gateway.client() as client:
            made(client, "v")
            with pytest.raises(StorageError, match=rf"user {OWNER}, mode 0600: .*CAP_CHOWN.*confinement\.md"):
                client.attach("v", socket_owner=str(OWNER))
            assert client.attachments() == []
            assert not list(gateway.run_dir.glob("vhost/*"))
            # Its own mode takes no right.
            path = Path(client.attach("v", socket_mode="0660").socket)
            assert rights_of(path) == (0, os.getegid(), 0o660)
