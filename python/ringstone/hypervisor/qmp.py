"""A synchronous face of the `qemu.qmp` library, for code that reads like an operator's script.

Protocol: QEMU Machine Protocol, docs/interop/qmp-spec.rst of QEMU.
"""

import asyncio
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import EventListener, QMPClient, QMPError

from ringstone.hypervisor.versions import QemuVersion


@dataclass(frozen=True)
class QmpEvent:
    """An event of QEMU, SHUTDOWN or DEVICE_DELETED for example, with its data."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)


class QmpSession:
    """One QMP session over a connected socket, which it owns. Not for use inside a running event loop.

    Raises QMPError when QEMU refuses a command or has gone, TimeoutError when an answer is late.
    """

    def __init__(self, connection: socket.socket, *, timeout_s: float = 30) -> None:
        self._timeout_s = timeout_s
        self._closed = False
        self._client = QMPClient("ringstone")
        self._events = EventListener()
        self._client.register_listener(self._events)
        self._runner = asyncio.Runner()
        connection.setblocking(False)
        try:
            self._runner.run(asyncio.wait_for(self._client.connect(connection), timeout_s))
        except BaseException:
            connection.close()
            self._runner.close()
            raise

    @classmethod
    def open(cls, path: Path, *, timeout_s: float = 30) -> Self:
        """The monitor that listens at `path` (-qmp unix:PATH,server=on,wait=off). OSError when none does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            raise
        return cls(connection, timeout_s=timeout_s)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """The command's return value."""
        call = self._client.execute(command, dict(arguments) if arguments else None)
        return self._runner.run(asyncio.wait_for(call, self._timeout_s))

    def version(self) -> QemuVersion:
        """The version of the QEMU at the other end."""
        answer = self.execute("query-version")
        assert isinstance(answer, dict)
        return QemuVersion(answer["qemu"]["major"], answer["qemu"]["minor"])

    def forget_events(self) -> None:
        """Drop the events received so far, so that `wait_event` waits for new ones."""
        self._runner.run(asyncio.sleep(0))  # take in what the socket already holds
        self._events.clear()

    def wait_event(self, names: Collection[str], *, timeout_s: float) -> QmpEvent:
        """The next event named in `names`; others are dropped."""

        async def wait() -> QmpEvent:
            while True:
                message: dict[str, Any] = dict(await self._events.get())
                if message["event"] in names:
                    return QmpEvent(message["event"], message.get("data", {}))

        return self._runner.run(asyncio.wait_for(wait(), timeout_s))

    def close(self) -> None:
        """End the session; QEMU goes on. Idempotent, and safe after QEMU has gone."""
        if self._closed:
            return
        self._closed = True

        async def disconnect() -> None:
            # The error that ended the session (QEMU went away, say) was or will be told by QEMU's exit
            # status.
            try:
                await self._client.disconnect()
            except (QMPError, EOFError, OSError):
                return

        self._runner.run(disconnect())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
