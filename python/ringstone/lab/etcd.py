"""A real etcd cluster of processes on this machine, whose members can be killed, stopped and started again."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from ringstone.certificates import trusting
from ringstone.errors import FailedError, NoDeviceError, UnreachableError

ETCD = "/usr/bin/etcd"
# Debian starts no etcd by itself for us: the binary is enough.
_READY = "serving client traffic"
_READY_SECONDS = 60
_STOP_SECONDS = 10
# A machine with few CPUs is late now and then; an election that it causes by that is no failure.
_HEARTBEAT_MS, _ELECTION_MS = 100, 1000


@dataclass(slots=True)
class Member:
    """One process. `command` goes before etcd's: `("ip", "netns", "exec", "host1")`."""

    name: str
    address: str
    client_port: int
    peer_port: int
    command: tuple[str, ...] = ()
    process: "subprocess.Popen[bytes] | None" = None
    ready: threading.Event = field(default_factory=threading.Event)
    reader: threading.Thread | None = None
    lines: list[str] = field(default_factory=list)


class EtcdCluster:
    """`directory`: where data and logs go; in memory (/dev/shm) unless the disk is what is tried. `quota_bytes`: the
    most that the database may take. `certificates`: `ca`, `cert` and `key` for https, with which clients and other
    members must come too.
    `places`: an address and a command prefix per member; without them all are on 127.0.0.1."""

    def __init__(
        self,
        directory: Path,
        *,
        quota_bytes: int | None = None,
        certificates: Mapping[str, Path] | None = None,
        places: Sequence[tuple[str, tuple[str, ...]]] = (),
    ) -> None:
        self.directory = directory
        self.members: list[Member] = []
        # Of whoever may ask members how they are, once there are users.
        self.login: tuple[str, str] | None = None
        self._quota_bytes = quota_bytes
        self._certificates = certificates
        self._places = places

    def start(self, members: int = 3) -> None:
        """All at once; returns when every one serves."""
        if not os.access(ETCD, os.X_OK):
            raise NoDeviceError(f"{ETCD} is not there; install Debian's etcd-server.")
        self.members = self._planned(members)
        try:
            for member in self.members:
                self._spawn(member, "new")
            for member in self.members:
                self._wait(member)
        except BaseException:
            self.stop()
            raise

    def _planned(self, count: int) -> list[Member]:
        places = self._places or [("127.0.0.1", ())] * count
        ports: Iterator[int]
        if self._places:
            ports = iter([2379, 2380] * count)
        else:
            ports = iter(free_ports(2 * count))
        return [
            Member(f"etcd{n}", address, next(ports), next(ports), command)
            for n, (address, command) in zip(range(count), places, strict=True)
        ]

    @property
    def scheme(self) -> str:
        return "https" if self._certificates else "http"

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(self.endpoint(n) for n in range(len(self.members)))

    def endpoint(self, member: int) -> str:
        one = self.members[member]
        return f"{self.scheme}://{one.address}:{one.client_port}"

    def pids(self) -> list[int]:
        """Of those that run."""
        return [
            one.process.pid for one in self.members if one.process is not None and one.process.poll() is None
        ]

    def _spawn(self, member: Member, state: str) -> None:
        client, peer = (
            f"{self.scheme}://{member.address}:{member.client_port}",
            f"{self.scheme}://{member.address}:{member.peer_port}",
        )
        cluster = ",".join(
            f"{one.name}={self.scheme}://{one.address}:{one.peer_port}" for one in self.members
        )
        command = [
            *member.command,
            ETCD,
            f"--name={member.name}",
            f"--data-dir={self.directory / member.name}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={cluster}",
            f"--initial-cluster-token={self.directory}",
            f"--initial-cluster-state={state}",
            f"--heartbeat-interval={_HEARTBEAT_MS}",
            f"--election-timeout={_ELECTION_MS}",
            "--logger=zap",
            "--log-outputs=stderr",
        ]
        if self._quota_bytes is not None:
            command.append(f"--quota-backend-bytes={self._quota_bytes}")
        if self._certificates is not None:
            command += [
                f"--cert-file={self._certificates['cert']}",
                f"--key-file={self._certificates['key']}",
                f"--trusted-ca-file={self._certificates['ca']}",
                "--client-cert-auth",
                f"--peer-cert-file={self._certificates['cert']}",
                f"--peer-key-file={self._certificates['key']}",
                f"--peer-trusted-ca-file={self._certificates['ca']}",
                "--peer-client-cert-auth",
            ]
        member.ready = threading.Event()
        member.lines = []
        # A session of its own: a person's Ctrl-C is for the program that owns the cluster.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        member.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
        )
        member.reader = threading.Thread(target=_follow, args=(member, member.process), daemon=True)
        member.reader.start()

    def _wait(self, member: Member) -> None:
        if not member.ready.wait(_READY_SECONDS):
            raise UnreachableError(f"{member.name} does not get ready:\n{_tail(member)}")
        if member.process is None or member.process.poll() is not None:
            raise FailedError(f"{member.name} has ended:\n{_tail(member)}")

    def kill(self, member: int, how: int = signal.SIGKILL) -> None:
        """Returns when the process is gone."""
        one = self.members[member]
        if one.process is None:
            return
        one.process.send_signal(how)
        if how != signal.SIGKILL:
            try:
                one.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                one.process.kill()
        one.process.wait()
        if one.reader is not None:
            one.reader.join()
        if one.process.stderr is not None:
            one.process.stderr.close()
        one.process = None

    def restart(self, member: int) -> None:
        """One that was killed, with the data it had."""
        self._spawn(self.members[member], "existing")
        self._wait(self.members[member])

    def restart_all(self) -> None:
        """Those that were killed, all at once: a majority may be among them, without which none gets ready."""
        gone = [one for one in self.members if one.process is None]
        for one in gone:
            self._spawn(one, "existing")
        for one in gone:
            self._wait(one)

    def pause(self, member: int) -> None:
        """It neither runs nor closes its connections, as if cut off."""
        self._signal(member, signal.SIGSTOP)

    def resume(self, member: int) -> None:
        self._signal(member, signal.SIGCONT)

    def _signal(self, member: int, number: int) -> None:
        process = self.members[member].process
        assert process is not None, "only what runs is stopped or continued"
        process.send_signal(number)

    def leader(self) -> int:
        """The index of the member that leads now; UnreachableError while there is none, with what came of asking."""
        problems = []
        with self.client() as client:
            for n, one in enumerate(self.members):
                if one.process is None:
                    continue
                try:
                    status = self._status(client, self.endpoint(n))
                except httpx2.HTTPError as error:
                    problems.append(f"{one.name}: {error or type(error).__name__}")
                    continue
                if status.get("leader") == status["header"]["member_id"]:
                    return n
        told = f" ({'; '.join(problems)})" if problems else ""
        raise UnreachableError(f"No member of the etcd cluster leads now{told}; try again in a moment.")

    def _status(self, client: httpx2.Client, endpoint: str) -> Any:
        """As the member says it: 3.5.30 tells it users only, earlier ones everybody."""
        headers = {}
        if self.login is not None:
            name, password = self.login
            answer = client.post(
                f"{endpoint}/v3/auth/authenticate", json={"name": name, "password": password}
            )
            headers["Authorization"] = str(answer.raise_for_status().json()["token"])
        answer = client.post(f"{endpoint}/v3/maintenance/status", json={}, headers=headers)
        return answer.raise_for_status().json()

    def wait_for_leader(self) -> int:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                return self.leader()
            except UnreachableError:
                # Asking takes as long as an answer does, so this does not spin while members start.
                if not self.pids() or time.monotonic() > deadline:
                    raise

    def client(self) -> httpx2.Client:
        """For calls of the members' own."""
        if self._certificates is None:
            return httpx2.Client(timeout=2, trust_env=False)
        context = trusting(self._certificates["ca"])
        context.load_cert_chain(self._certificates["cert"], self._certificates["key"])
        return httpx2.Client(timeout=2, trust_env=False, verify=context)

    def stop(self) -> None:
        """All that this started. Idempotent."""
        with ExitStack() as stack:
            for n, one in enumerate(self.members):
                if one.process is not None:
                    # One that was paused must go on to hear of it; the data is not wanted any more.
                    stack.callback(self.kill, n)


def _follow(member: Member, process: "subprocess.Popen[bytes]") -> None:
    """Keep what it says, so that its pipe never fills, and look for the word."""
    assert process.stderr is not None
    for line in process.stderr:
        member.lines.append(line.decode(errors="replace").rstrip())
        del member.lines[:-200]
        if _READY in member.lines[-1]:
            member.ready.set()
    member.ready.set()


def _tail(member: Member) -> str:
    return "\n".join(member.lines[-20:])


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in taken]


@contextmanager
def etcd_cluster(directory: Path, members: int = 3, **settings: int) -> Iterator[EtcdCluster]:
    """A cluster for as long as the block runs."""
    cluster = EtcdCluster(directory, quota_bytes=settings.get("quota_bytes"))
    cluster.start(members)
    try:
        yield cluster
    finally:
        cluster.stop()
