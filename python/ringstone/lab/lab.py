"""A whole cluster on this machine: etcd, Ceph, and hosts as network namespaces, each with its gateway.

All of it lives in one folder in memory and ends with the process that started it.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ringstone.lab.ceph import CephCluster
from ringstone.lab.ceph_conf import CephSettings
from ringstone.lab.credentials import Credentials
from ringstone.lab.etcd import EtcdCluster
from ringstone.lab.etcd_access import EtcdAccess
from ringstone.lab.folders import make_folder
from ringstone.lab.host import LabHost, cores_of
from ringstone.lab.manager import LabManager
from ringstone.lab.network import Network
from ringstone.lab.process import LabError, ending_with_us
from ringstone.progress import NoProgress, Progress

if TYPE_CHECKING:
    from ringstone.hypervisor.accelerator import Accelerator
    from ringstone.hypervisor.guest import Guest
    from ringstone.hypervisor.guest_image import GuestImage


GATEWAY_PORT = 7480
MANAGER_PORT = 7481


@dataclass(frozen=True)
class LabSettings:
    """What the lab consists of. The hosts have their state in etcd and are one cluster. `gateway_arguments` and
    `gateway_environment` are for a host's gateway, made when Ceph and etcd run, so that they can name them; of what is
    given twice, theirs counts."""

    hosts: Sequence[str] = ("a", "b")
    etcd_members: int = 1
    managers: int = 0
    ceph: CephSettings = field(default_factory=CephSettings)
    gateway_arguments: Callable[["Lab", str], Sequence[str]] = lambda lab, host: ()
    gateway_environment: Callable[["Lab", str], Mapping[str, str]] = lambda lab, host: {}


class Lab:
    """Started when entered, and gone when left. Takes root, for the namespaces.

    lab.hosts["a"].kill(); lab.ceph.kill_osd(1); lab.hosts["b"].partition(); lab.etcd.kill(0)
    """

    network: Network
    etcd: EtcdCluster
    etcd_access: EtcdAccess
    ceph: CephCluster
    folder: Path
    credentials: Credentials

    def __init__(self, settings: LabSettings | None = None) -> None:
        self.settings = settings or LabSettings()
        self.hosts: dict[str, LabHost] = {}
        self.managers: list[LabManager] = []
        # What stop() undoes, the latest first.
        self._undo: list[Callable[[], None]] = []
        self._numbers = itertools.count()

    def start(self, progress: Progress | None = None) -> Self:
        """Returns when Ceph is healthy, etcd has a leader and every gateway is ready."""
        steps = progress or NoProgress()
        if self._undo:
            raise LabError("The lab runs already. Stop it first.")
        try:
            self._start_network(steps)
            self._start_etcd(steps)
            self._start_ceph(steps)
            self._start_hosts(steps)
            self._start_managers(steps)
        except BaseException:
            self.stop()
            raise
        return self

    def _start_network(self, steps: Progress) -> None:
        with steps.step("Network") as step:
            self.network = Network()
            self._undo.append(self.network.stop)
            self.network.start()
            self.folder = make_folder("lab")
            self._undo.append(lambda: shutil.rmtree(self.folder))
            step.detail = f"this machine is {self.network.address}, on bridge {self.network.bridge}"

    def _start_etcd(self, steps: Progress) -> None:
        with steps.step("etcd") as step:
            # A namespace each, so that one can be cut off from the others: network.partition("etcd0").
            names = [f"etcd{number}" for number in range(self.settings.etcd_members)]
            places = [
                (self.network.add_host(name), tuple(ending_with_us(self.network.command(name, []))))
                for name in names
            ]
            (self.folder / "etcd").mkdir()
            self.credentials = Credentials(self.folder / "credentials")
            self.etcd_access = EtcdAccess(self.credentials)
            certificates = self.etcd_access.certificates([address for address, _ in places])
            self.etcd = EtcdCluster(self.folder / "etcd", certificates=certificates, places=places)
            self._undo.append(self.etcd.stop)
            self.etcd.start(len(names))
            self.etcd_access.require(self.etcd)
            step.detail = ", ".join(self.etcd.endpoints)

    def _start_ceph(self, steps: Progress) -> None:
        with steps.step("Ceph") as step:
            self.ceph = CephCluster(
                self.folder / "ceph", address=self.network.address, settings=self.settings.ceph
            )
            self._undo.append(self.ceph.stop)
            self.ceph.start()
            step.detail = f"{self.settings.ceph.osds} OSDs, {self.ceph.conf_path}"

    def _start_hosts(self, steps: Progress) -> None:
        with steps.step("Hosts") as step:
            for index, name in enumerate(self.settings.hosts):
                host = LabHost(
                    name,
                    self.network,
                    self.folder / f"host-{name}",
                    cores=cores_of(index),
                    environment=self.settings.gateway_environment(self, name),
                )
                self._undo.append(host.kill)
                host.arguments = [*self._membership(host), *self.settings.gateway_arguments(self, name)]
                self.hosts[name] = host
            for host in self.hosts.values():
                host.launch()
            for host in self.hosts.values():
                host.wait_ready()
            step.detail = ", ".join(f"{host.name} is {host.address}" for host in self.hosts.values())

    def _membership(self, host: LabHost) -> list[str]:
        """What makes a gateway a host of the cluster."""
        return [
            *("--host", host.name),
            *self.etcd_access.arguments(self.etcd, self.credentials.certificate(host.address, host.name)),
            *self.credentials.gateway_arguments(host.name, host.address, GATEWAY_PORT),
        ]

    def _start_managers(self, steps: Progress) -> None:
        if not self.settings.managers:
            return
        with steps.step("Managers") as step:
            for number in range(self.settings.managers):
                manager = LabManager(
                    str(number),
                    self.folder,
                    address=self.network.address,
                    port=MANAGER_PORT + number,
                    etcd=self.etcd_access.arguments(
                        self.etcd, self.credentials.certificate(self.network.address)
                    ),
                    credentials=self.credentials,
                )
                self._undo.append(manager.kill)
                self.managers.append(manager)
                manager.start()
            step.detail = ", ".join(manager.url for manager in self.managers)

    def stop(self) -> None:
        """End all that was started and remove all files. Nothing is worth an orderly end here. Idempotent."""
        failures: list[Exception] = []
        while self._undo:
            # One that is interrupted stays, to be done by the next call.
            try:
                self._undo[-1]()
            except Exception as error:
                failures.append(error)
            self._undo.pop()
        self.hosts.clear()
        self.managers.clear()
        if failures:
            raise LabError(f"The lab did not stop in order: {'; '.join(map(str, failures))}") from failures[0]

    @contextmanager
    def started(self, progress: Progress, hold: Callable[[], None]) -> Iterator[Self]:
        """As `with lab`, shown to a person. `hold` is called when it runs: from then on no signal may raise."""
        try:
            self.start(progress)
            hold()
            yield self
        finally:
            # What start() removes when it fails, a signal can interrupt: once, and the rest is removed here.
            if self._undo:
                with progress.step("Stop and remove"):
                    self.stop()

    # Guests.

    @contextmanager
    def boot(self, host: str, *volumes: str, cpus: int = 1, packed: bool = True) -> Iterator["Guest"]:
        """A guest on `host` with its attached `volumes` as disks vda, vdb and so on; QEMU is gone at the end."""
        from ringstone.hypervisor.args import Disk
        from ringstone.hypervisor.guest import Guest
        from ringstone.hypervisor.qemu import QemuConfig

        image, accelerator = self._guests
        disks = []
        with self.hosts[host].client() as client:
            for volume in volumes:
                attachment = client.attachment(volume)
                disks.append(Disk(attachment.socket, volume, attachment.queues, packed=packed))
        folder = self.folder / f"guest-{next(self._numbers)}"
        with Guest(QemuConfig(image, accelerator.name, folder, disks, cpus=cpus)) as guest:
            yield guest

    @cached_property
    def _guests(self) -> tuple["GuestImage", "Accelerator"]:
        from ringstone.hypervisor.accelerator import choose_accelerator
        from ringstone.hypervisor.guest_image import ensure_guest_image

        image = ensure_guest_image()
        return image, choose_accelerator(image)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
