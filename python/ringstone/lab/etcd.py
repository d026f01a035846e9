"""An etcd cluster of our own processes, whose members can be killed, stopped and started again."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from ringstone.lab.process import Daemon, LabError, free_ports, need

_START_SECONDS = 60.0
_ASK_SECONDS = 2.0


class EtcdCluster:
    """`directory`: where data and logs go. `places`: an address and a command prefix per member; without them all are
    on 127.0.0.1."""

    def __init__(self, directory: Path, *, places: Sequence[tuple[str, tuple[str, ...]]] = ()) -> None:
        self._directory = directory
        self._places = places
        self._members: list[Daemon] = []
        self.endpoints: tuple[str, ...] = ()

    def start(self, members: int = 3) -> None:
        """All at once; returns when every one is healthy, that is, has a leader."""
        need("etcd", "etcd-server")
        places = self._places or [("127.0.0.1", ())] * members
        # Those that share an address need ports of their own.
        ports = iter([2379, 2380] * members if self._places else free_ports("127.0.0.1", 2 * members))
        urls = [
            (f"http://{place[0]}:{next(ports)}", f"http://{place[0]}:{next(ports)}")
            for place in places[:members]
        ]
        self.endpoints = tuple(client for client, _ in urls)
        everyone = ",".join(f"etcd{number}={peer}" for number, (_, peer) in enumerate(urls))
        for number, ((client, peer), (_, prefix)) in enumerate(zip(urls, places, strict=True)):
            name = f"etcd{number}"
            command = [
                *(*prefix, "etcd", "--name", name, "--data-dir", str(self._directory / name)),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", everyone, "--initial-cluster-state", "new"),
            ]
            self._members.append(Daemon(name, command, logs=self._directory))
        try:
            for member in self._members:
                member.start()
            for number in range(members):
                self._wait(number)
        except BaseException:
            self.stop()
            raise

    def pids(self) -> list[int]:
        """Of those that run."""
        return [member.pid for member in self._members if member.running()]

    def kill(self, member: int) -> None:
        """SIGKILL; returns when the process is gone."""
        self._members[member].kill()

    def restart(self, member: int) -> None:
        """One that was killed, with the data it had."""
        self._members[member].start()
        self._wait(member)

    def pause(self, member: int) -> None:
        """SIGSTOP: it neither runs nor closes its connections."""
        self._members[member].pause()

    def resume(self, member: int) -> None:
        """SIGCONT."""
        self._members[member].resume()

    def stop(self) -> None:
        """End all members. Idempotent."""
        for member in self._members:
            member.kill()
        self._members.clear()

    def _wait(self, member: int) -> None:
        if not self._members[member].running():
            raise LabError(f"etcd{member} does not run. Start it first.")
        self._members[member].wait("was healthy", lambda: self._healthy(member), _START_SECONDS)

    def _healthy(self, number: int) -> bool:
        # No proxy is asked for what is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.endpoints[number]}/health", timeout=_ASK_SECONDS) as answer:
                return bool(json.load(answer)["health"] == "true")
        except OSError:
            return False
