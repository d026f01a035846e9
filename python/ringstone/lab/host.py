"""One host of the lab: a network namespace and a `ringstone gateway` in it, with state and sockets of its own."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ringstone.client import GatewayClient
from ringstone.lab.network import Network
from ringstone.lab.process import Daemon, Notifications

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
# A reactor that polls in vain takes its core from the other hosts, which share it here.
_IDLE_US = 20


class LabHost:
    """`arguments` and `environment` are those of its gateway beside the usual ones; changed, they count from its next
    start on."""

    def __init__(
        self,
        name: str,
        network: Network,
        folder: Path,
        *,
        cores: Sequence[int],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.address = network.add_host(name)
        self.folder = folder
        self.run_dir = folder / "run"
        self.state_dir = folder / "state"
        self.socket = self.run_dir / "gateway.sock"
        self.stats_path = self.run_dir / "stats"
        self.cores = list(cores)
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self._network = network
        self._notifications: Notifications | None = None
        self._gateway: Daemon | None = None

    @property
    def gateway(self) -> Daemon:
        """The process of the last start."""
        assert self._gateway is not None, "the gateway was started"
        return self._gateway

    def gateway_runs(self) -> bool:
        return self._gateway is not None and self._gateway.running()

    def start(self) -> None:
        """Start the gateway, and wait until it says READY=1."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Begin to start it; wait_ready() does the rest."""
        self.folder.mkdir(exist_ok=True)
        self._gateway = Daemon(f"gateway-{self.name}", self.command(), logs=self.folder)
        self._close_notifications()
        self._notifications = Notifications(self.folder / "notify")
        # What would lead it to another gateway's socket, or to another service manager's log.
        others = dict.fromkeys(("RINGSTONE_SOCKET", "JOURNAL_STREAM", "WATCHDOG_USEC", "WATCHDOG_PID"))
        own = {"NOTIFY_SOCKET": str(self._notifications.path), **self.environment}
        self._gateway.start(environment={**others, **own})

    def command(self) -> list[str]:
        """What is run."""
        return self._network.command(
            self.name,
            [
                *(sys.executable, "-m", "ringstone", "gateway"),
                *("--state-dir", str(self.state_dir), "--run-dir", str(self.run_dir)),
                *("--cores", ",".join(map(str, self.cores)), "--idle-us", str(_IDLE_US)),
                *self.arguments,
            ],
        )

    def wait_ready(self) -> None:
        """Until a gateway that was launched serves. LabError with its log when it ends or takes too long."""
        assert self._notifications is not None, "the gateway was launched"
        self._notifications.wait_ready(self.gateway, _START_SECONDS)

    def stop(self) -> int | None:
        """As a service manager does: SIGTERM; its exit status."""
        status = self.gateway.terminate(_STOP_SECONDS)
        self._close_notifications()
        return status

    def kill(self) -> None:
        """As a crash: SIGKILL. Also for one that is stopped or does not run."""
        if self._gateway is not None:
            self._gateway.kill()
        self._close_notifications()

    def pause(self) -> None:
        """SIGSTOP: to the rest of the cluster it looks dead, and it may come back."""
        self.gateway.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.gateway.resume()

    def partition(self) -> None:
        """Cut the host off from all others, from Ceph and from etcd. Its Unix sockets work on."""
        self._network.partition(self.name)

    def heal(self) -> None:
        """Connect it again."""
        self._network.heal(self.name)

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """What a command prints that runs on this host."""
        return self._network.run(self.name, *command, timeout_s=timeout_s)

    def client(self) -> GatewayClient:
        """A client of this host's gateway, for a `with`."""
        return GatewayClient(self.socket)

    def forget_starts(self) -> None:
        """As if the gateway had served for long since it last died: it does not slow its next start down."""
        (self.run_dir / "starts").unlink(missing_ok=True)

    def _close_notifications(self) -> None:
        if self._notifications is not None:
            self._notifications.close()
            self._notifications = None


def cores_of(index: int) -> list[int]:
    """One CPU for a host's reactor; hosts share where there are fewer, and the first CPU is left for the rest."""
    available = sorted(os.sched_getaffinity(0), reverse=True)
    return [available[index % max(1, len(available) - 1)]]
