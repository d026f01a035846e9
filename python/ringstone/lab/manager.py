"""A `ringstone manager` of the lab."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ringstone.client import RemoteClient
from ringstone.lab.credentials import Credentials
from ringstone.lab.process import Daemon, Notifications

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0


class LabManager:
    """At `address`, with its log in `folder`. `etcd`: the flags for etcd. `arguments` are those beside the
    usual ones."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        address: str,
        port: int,
        etcd: Sequence[str],
        credentials: Credentials,
        arguments: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.url = f"https://{address}:{port}"
        self.credentials = credentials
        self._folder = folder
        command = [
            *(sys.executable, "-m", "ringstone", "manager", *etcd),
            *credentials.manager_arguments(address, port),
            *arguments,
        ]
        self.process = Daemon(f"manager-{name}", command, logs=folder)

    def start(self) -> None:
        """Returns when it says READY=1."""
        path = self._folder / f"notify-{self.name}"
        notifications = Notifications(path)
        try:
            others = dict.fromkeys(("JOURNAL_STREAM", "WATCHDOG_USEC", "WATCHDOG_PID"))
            self.process.start(environment={**others, "NOTIFY_SOCKET": str(path)})
            notifications.wait_ready(self.process, _START_SECONDS)
        finally:
            notifications.close()

    def stop(self) -> int | None:
        """SIGTERM; its exit status."""
        return self.process.terminate(_STOP_SECONDS)

    def kill(self) -> None:
        self.process.kill()

    def client(self) -> RemoteClient:
        """For a `with`."""
        return RemoteClient(self.url, token=self.credentials.token, ca=self.credentials.ca)

    def command_line(self) -> list[str]:
        """The global options with which `ringstone` talks to it."""
        files = ("--token-file", str(self.credentials.token_file), "--ca", str(self.credentials.ca))
        return ["--manager", self.url, *files]
