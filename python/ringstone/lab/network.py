"""Hosts as network namespaces, joined by a bridge whose address is this machine's end.

Names have the process id in them, so that runs beside each other do not meet, and so that the next run finds what one
that was killed has left.
"""

import contextlib
import ipaddress
import itertools
import json
import os
import re
import select
import signal
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ringstone.errors import UnsupportedError
from ringstone.lab.folders import alive
from ringstone.lab.process import LabError, run

# Few sites route this; the first part of it that this machine does not is taken.
_RANGE = ipaddress.ip_network("10.213.0.0/16")
_NAMESPACES = Path("/run/netns")
_OWNED_NAMESPACE = re.compile(r"ringstone-(\d+)-\d+-")
_OWNED_LINK = re.compile(r"rs(\d+)n\d+(?:b|h\d+)$")
_END_SECONDS = 30.0
_numbers = itertools.count()


class Network:
    """Made when entered, and gone with all its namespaces when left. Takes root."""

    def __init__(self) -> None:
        # The name of a link has 15 bytes at most; process ids have up to 7.
        number = next(_numbers)
        self._links = f"rs{os.getpid()}n{number}"
        self._namespaces = f"ringstone-{os.getpid()}-{number}-"
        self.bridge = f"{self._links}b"
        self._hosts: list[str] = []
        self._made = False

    def start(self) -> Self:
        """Make the bridge. UnsupportedError for a user who may not."""
        if os.geteuid() != 0:
            raise UnsupportedError(
                "Network namespaces take root. Run it as root: sudo .venv/bin/ringstone lab"
            )
        remove_remains()
        self._subnet = _free_subnet()
        self.address = str(self._subnet[1])
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            self._made = True
            _ip("address", "add", f"{self.address}/{self._subnet.prefixlen}", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
        except BaseException:
            self.stop()
            raise
        return self

    def add_host(self, name: str) -> str:
        """A namespace of that name, connected to the bridge; its address."""
        self._hosts.append(name)
        namespace, link = self.namespace(name), self._link(name)
        address = self.address_of(name)
        _ip("netns", "add", namespace)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", namespace, "address", "add", f"{address}/{self._subnet.prefixlen}", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("link", "set", link, "master", self.bridge, "up")
        return address

    def namespace(self, host: str) -> str:
        """The namespace's name, as `ip netns` shows it."""
        return f"{self._namespaces}{host}"

    def address_of(self, host: str) -> str:
        """The host's address; all hosts and this machine reach it."""
        return str(self._subnet[10 + self._index(host)])

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """`command` as it runs on that host; the process id stays that of the command itself."""
        self._index(host)
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def run(self, host: str, *command: str, timeout_s: float = 60) -> str:
        """What a command prints that runs on that host."""
        return run(self.command(host, command), timeout_s=timeout_s)

    def partition(self, host: str) -> None:
        """Nothing reaches the host, and nothing that it sends arrives; nobody is told, as with a switch that fails."""
        _ip("link", "set", self._link(host), "nomaster")

    def heal(self, host: str) -> None:
        """It is connected again."""
        _ip("link", "set", self._link(host), "master", self.bridge)

    def stop(self) -> None:
        """Remove all of it, and end what still runs in the namespaces: a gateway that was upgraded is no child of
        whoever started it. Idempotent."""
        for host in self._hosts:
            _remove_namespace(self.namespace(host))
            _remove_link(self._link(host))
        self._hosts.clear()
        if self._made:
            self._made = False
            _remove_link(self.bridge)

    def _index(self, host: str) -> int:
        if host not in self._hosts:
            raise LabError(f"There is no host {host!r}; there are {', '.join(self._hosts) or 'none'}.")
        return self._hosts.index(host)

    def _link(self, host: str) -> str:
        return f"{self._links}h{self._index(host)}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def remove_remains() -> None:
    """Remove the namespaces and bridges of processes that are gone."""
    for path in _NAMESPACES.glob("ringstone-*"):
        found = _OWNED_NAMESPACE.match(path.name)
        if found and not alive(int(found[1])):
            _remove_namespace(path.name)
    for path in Path("/sys/class/net").glob("rs*"):
        found = _OWNED_LINK.match(path.name)
        if found and not alive(int(found[1])):
            _remove_link(path.name)


def _remove_namespace(name: str) -> None:
    """With all processes that are in it."""
    if not (_NAMESPACES / name).exists():
        return
    for pid in map(int, _ip("netns", "pids", name).split()):
        # It may have ended by itself meanwhile.
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], _END_SECONDS)
            finally:
                os.close(pidfd)
    _ip("netns", "delete", name)


def _remove_link(name: str) -> None:
    """One that goes with its namespace does so when the kernel comes to it, which may be now."""
    path = Path("/sys/class/net") / name
    if path.exists():
        run(["ip", "link", "delete", name], package="iproute2", check=False)
    if path.exists():
        raise LabError(f"The link {name} is still there. Remove it: ip link delete {name}")


def _free_subnet() -> ipaddress.IPv4Network:
    """A part of the range that none of this machine's routes covers, but for one to everywhere."""
    routes = [
        ipaddress.ip_network(route["dst"])
        for route in json.loads(_ip("-json", "-4", "route", "show", "table", "all"))
        if route["dst"] != "default"
    ]
    assert isinstance(_RANGE, ipaddress.IPv4Network)
    for subnet in _RANGE.subnets(new_prefix=24):
        if not any(subnet.overlaps(route) for route in routes if isinstance(route, ipaddress.IPv4Network)):
            return subnet
    raise LabError(f"All of {_RANGE} is routed on this machine already.")


def _ip(*arguments: str) -> str:
    return run(["ip", *arguments], package="iproute2")
