"""A gateway of the demo's own: a `ringstone gateway` process with its state and sockets in one folder."""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ringstone.client import GatewayClient
from ringstone.errors import RingstoneError

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
_TAIL_LINES = 20


class GatewayProcess:
    """Starts when entered, is ready when that returns, and is ended by its pid when left.

    Raises RingstoneError, with the tail of the gateway's log, when it does not become ready.
    """

    def __init__(self, folder: Path, *, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.socket = folder / "run" / "gateway.sock"
        self.stats_path = folder / "run" / "stats"
        self.log = folder / "gateway.log"
        self._command = [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *(sys.executable, "-m", "ringstone", "--socket", str(self.socket), "gateway"),
            *("--state-dir", str(folder / "state"), "--run-dir", str(folder / "run"), *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._client: GatewayClient | None = None

    @property
    def pid(self) -> int:
        """The running gateway's process id."""
        assert self._process is not None, "the gateway was started"
        return self._process.pid

    @property
    def client(self) -> GatewayClient:
        """A client of the running gateway."""
        assert self._client is not None, "the gateway was started"
        return self._client

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        notify_path = self.folder / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify_path.unlink(missing_ok=True)
            notify.bind(str(notify_path))
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"NOTIFY_SOCKET": str(notify_path)},
                start_new_session=True,  # Ctrl-C is for the parent, which ends the gateway after the guest
            )
            try:
                self._wait_ready(self._process, notify)
            except BaseException:
                self.stop()
                raise
            finally:
                notify_path.unlink()
        self._client = GatewayClient(self.socket)

    def _wait_ready(self, process: subprocess.Popen[bytes], notify: socket.socket) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        pidfd = os.pidfd_open(process.pid)
        try:
            while True:
                ready, _, _ = select.select(
                    [notify.fileno(), pidfd], [], [], max(0.0, deadline - time.monotonic())
                )
                if notify.fileno() in ready:
                    if b"READY=1" in notify.recv(4096).splitlines():
                        return
                elif ready:
                    raise RingstoneError(f"The gateway ended before it was ready.\n{self._tail()}")
                else:
                    raise RingstoneError(
                        f"The gateway was not ready within {READY_TIMEOUT_S:.0f} s.\n{self._tail()}"
                    )
        finally:
            os.close(pidfd)

    def stop(self) -> int | None:
        """End it and wait; its exit status, None when it did not run. Killed when it takes too long."""
        if self._process is None:
            return None
        if self._client is not None:
            self._client.close()
            self._client = None
        process, self._process = self._process, None
        process.terminate()
        try:
            return process.wait(STOP_TIMEOUT_S)
        except BaseException:
            process.kill()
            process.wait()
            raise

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return "\n".join(lines[-_TAIL_LINES:]) or "It wrote no log."

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
