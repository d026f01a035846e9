"""An etcd cluster of our own processes, with its data in the lab's folder."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

from ringstone.lab.process import Daemon, free_ports

_START_SECONDS = 60.0
_ASK_SECONDS = 2.0


class EtcdCluster:
    """Members are numbered from 0. All listen at `address`; `folder` is made and stays the caller's to remove."""

    def __init__(self, folder: Path, *, address: str = "127.0.0.1", members: int = 1) -> None:
        self._folder = folder
        self._address = address
        self._count = members
        self._members: list[Daemon] = []
        self.endpoints: list[str] = []

    def start(self) -> Self:
        """Returns when every member says that it is healthy, that is, has a leader."""
        self._folder.mkdir(parents=True)
        ports = free_ports(self._address, 2 * self._count)
        self.endpoints = [f"http://{self._address}:{port}" for port in ports[: self._count]]
        peers = [f"http://{self._address}:{port}" for port in ports[self._count :]]
        everyone = ",".join(f"m{number}={peer}" for number, peer in enumerate(peers))
        for number, (endpoint, peer) in enumerate(zip(self.endpoints, peers, strict=True)):
            command = [
                *("etcd", "--name", f"m{number}", "--data-dir", str(self._folder / f"m{number}")),
                *("--listen-client-urls", endpoint, "--advertise-client-urls", endpoint),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", everyone, "--initial-cluster-state", "new"),
            ]
            self._members.append(Daemon(f"etcd.{number}", command, logs=self._folder, package="etcd-server"))
        try:
            for member in self._members:
                member.start()
            for number in range(self._count):
                self.wait_member(number)
        except BaseException:
            self.stop()
            raise
        return self

    def wait_member(self, number: int) -> None:
        """Until a member is healthy."""
        self._members[number].wait("was healthy", lambda: self._healthy(number), _START_SECONDS)

    def kill(self, member: int) -> None:
        """SIGKILL."""
        self._members[member].kill()

    def start_member(self, member: int) -> None:
        """Start one that was killed, with its data, and wait until it is healthy."""
        self._members[member].start()
        self.wait_member(member)

    def stop(self) -> None:
        """End all members. Idempotent."""
        for member in self._members:
            member.kill()
        self._members.clear()

    def _healthy(self, number: int) -> bool:
        # No proxy is asked for what is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.endpoints[number]}/health", timeout=_ASK_SECONDS) as answer:
                return bool(json.load(answer)["health"] == "true")
        except (OSError, urllib.error.URLError):
            return False
