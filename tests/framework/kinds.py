"""Volumes of every type of pool, for tests of what holds for all of them."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from ringstone import models
from ringstone.lab.ceph import CephCluster
from tests.framework.devices import loop_device
from tests.framework.gateway import GatewayProcess
from tests.framework.rbd import make_rbd_pool

_ON_DISK = Path(__file__).resolve().parents[2] / ".cache"
MIB = 1 << 20
SIZE = 64 * MIB
# What a device has beyond its volume, which grows.
_SPARE = 64 * MIB
# `sealed`: of a store too, encrypted and with checksums.
KINDS = ("memory", "file", "device", "rbd", "store", "sealed")

# Kinds whose medium has snapshots.
SNAPSHOT_KINDS = ("rbd", "store", "sealed")


class Volumes:
    """Of one kind, on one gateway. What it made is gone when the `with` block is left, in a cluster too."""

    def __init__(self, gateway: GatewayProcess, kind: str, request: pytest.FixtureRequest) -> None:
        self.kind = kind
        self._gateway = gateway
        self._request = request
        self._made: list[str] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.kind == "rbd":
            ceph: CephCluster = self._request.getfixturevalue("ceph")
            make_rbd_pool(self._gateway, ceph, "rbd")
        return self

    def serve(self, volume: str = "disk", **more: Any) -> models.Attachment:
        """Make it and attach it."""
        pool = self._device_pool(volume) if self.kind == "device" else self.kind
        attachment = self._gateway.serve(volume, kind=pool, size=SIZE, **more)
        self._made.append(volume)
        return attachment

    def also(self, volume: str) -> None:
        """One that the test made."""
        self._made.append(volume)

    def _device_pool(self, volume: str) -> str:
        """A device has one volume. Its file is not below /tmp, which is in memory on Debian 13: tmpfs does not zero a
        range, and a loop device to which its file has refused that takes no discards any more."""
        _ON_DISK.mkdir(exist_ok=True)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="device-", dir=_ON_DISK)))
        device = self._stack.enter_context(loop_device(folder / volume, SIZE + _SPARE))
        name = f"of-{volume}"
        with self._gateway.client() as client:
            client.create_pool(models.PoolCreate(name=name, type="file", path=str(device)))
        return name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack, self._gateway.client() as client:
            # A clone goes before its parent.
            for volume in reversed(self._made):
                if client.volume(volume).attachment is not None:
                    client.detach(volume, force=True)
                for snapshot in client.snapshots(volume) if self.kind in SNAPSHOT_KINDS else []:
                    client.delete_snapshot(volume, snapshot.name)
                client.delete_volume(volume)
