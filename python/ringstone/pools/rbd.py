"""The rbd pool: images in a pool of a Ceph cluster, which every host with the cluster's ceph.conf reaches.

An image has its volume's name, so that `rbd ls` and all other tools of Ceph see the same objects.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ringstone.errors import ExistsError, FailedError, InvalidError, NoDeviceError
from ringstone.pools.base import Snapshot, Usage, admit_to_capacity
from ringstone.pools.librbd import ImageInfo, Images
from ringstone.state.records import JsonValue, PoolRecord, VolumeRecord

DEFAULT_CONF = "/etc/ceph/ceph.conf"
DEFAULT_USER = "client.admin"
_SMALLEST_ORDER, _LARGEST_ORDER = 12, 25


class RbdPool:
    """Implements ringstone.pools.Pool, SharedPool and SnapshotPool. Options: `ceph_pool` (by default the pool's name),
    `namespace`, `conf`, `user`, `keyring`, `order` (log2 of the objects' size), `data_pool` (for the data, such as an
    erasure-coded one)."""

    def __init__(self, record: PoolRecord) -> None:
        self.record = record
        text = _texts(record)
        self._conf = text.get("conf", DEFAULT_CONF)
        self._user = text.get("user", DEFAULT_USER)
        self._keyring = text.get("keyring")
        self._pool = text.get("ceph_pool", record.name)
        self._namespace = text.get("namespace", "")
        self._data_pool = text.get("data_pool", "")
        order = record.options.get("order")
        if order is not None and not (isinstance(order, int) and _SMALLEST_ORDER <= order <= _LARGEST_ORDER):
            raise InvalidError(
                f"The order {order!r} is no size of objects; use {_SMALLEST_ORDER} (4 KiB) to "
                f"{_LARGEST_ORDER} (32 MiB)."
            )
        self._order = order
        self._opened: Images | None = None

    def _images(self) -> Images:
        # Kept as long as the pool, so that what client() tells stays true until the volume is open.
        if self._opened is None:
            self._opened = self._connect()
        return self._opened

    def _connect(self) -> Images:
        return Images(
            conf=self._conf,
            user=self._user,
            keyring=self._keyring,
            pool=self._pool,
            namespace=self._namespace,
        )

    def prepare(self, *, erase: bool = False) -> None:
        self.check()

    def discard(self) -> None:
        return

    def identity(self) -> str | None:
        return f"rbd {self._images().identity()}:{self._namespace}"

    def check(self) -> None:
        self._images()

    def usage(self) -> Usage:
        total, free = self._images().usage()
        return Usage(total, free)

    def default_size(self) -> int | None:
        return None

    def admit(self, extra: int, volumes: Sequence[VolumeRecord], *, new: bool) -> None:
        # Ceph allocates what is written, so the cluster's free space says nothing about a new volume.
        admit_to_capacity(self.record, extra, volumes)

    def refuse_foreign(self, volume: VolumeRecord) -> None:
        with suppress(NoDeviceError):
            self._images().info(volume.name)
            raise ExistsError(
                f"Ceph pool {self._pool!r} has an image {volume.name!r} already, which belongs to no volume; remove it "
                "with `rbd rm`, rename it with `rbd mv`, or choose another name."
            )

    def create_backing(self, volume: VolumeRecord) -> None:
        self._images().create(volume.name, volume.size, order=self._order, data_pool=self._data_pool)

    def remove_backing(self, volume: VolumeRecord) -> None:
        with suppress(NoDeviceError):
            self._images().remove(volume.name)

    def resize_backing(self, volume: VolumeRecord, size: int) -> None:
        self._images().resize(volume.name, size)

    def check_backing(self, volume: VolumeRecord) -> None:
        try:
            have = self._images().info(volume.name).size
        except NoDeviceError as error:
            raise FailedError(f"Volume {volume.name!r} has no image. {error}") from error
        if have < volume.size:
            raise FailedError(
                f"Image {self._pool}/{volume.name} has {have} bytes instead of {volume.size}. If a growth was "
                f"cut short, `rbd resize --size {volume.size}B {self._pool}/{volume.name}` ends it."
            )

    def restore_backing(self, volume: VolumeRecord, *, new_boot: bool) -> str | None:
        # Opening the image says whether it is there; asking twice would make a start with many volumes twice as long.
        return None

    def allocated(self, volume: VolumeRecord) -> int | None:
        return None

    def backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        return {
            "type": "rbd",
            "conf": self._conf,
            "user": self._user,
            "keyring": self._keyring,
            "pool": self._pool,
            "namespace": self._namespace,
            "image": volume.name,
        }

    # ownership

    def client(self) -> str:
        return self._images().client()

    def retire(self, client: str) -> None:
        # Another volume's sake may have been enough to make a new one.
        if self.client() == client:
            self._images().retire()
            self._opened = None

    def owners(self, volume: VolumeRecord) -> tuple[str, ...]:
        return self._images().info(volume.name).owners

    def incoming_backend(self, volume: VolumeRecord) -> dict[str, JsonValue]:
        return {**self.backend(volume), "incoming": True}

    def owned_backend(
        self, volume: VolumeRecord, *, epoch: int, predecessors: Sequence[str]
    ) -> dict[str, JsonValue]:
        return {**self.backend(volume), "epoch": epoch, "predecessors": list(predecessors)}

    # snapshots

    def snapshots(self, volume: VolumeRecord) -> list[Snapshot]:
        return self._images().snapshots(volume.name)

    def create_snapshot(self, volume: VolumeRecord, name: str) -> None:
        self._images().create_snapshot(volume.name, name)

    def remove_snapshot(self, volume: VolumeRecord, name: str) -> None:
        self._images().remove_snapshot(volume.name, name)

    def revert(self, volume: VolumeRecord, name: str) -> None:
        self._images().revert(volume.name, name)

    def clone_backing(self, parent: VolumeRecord, snapshot: str, volume: VolumeRecord) -> None:
        self._images().clone(parent.name, snapshot, volume.name, order=self._order, data_pool=self._data_pool)

    def flatten(self, volume: VolumeRecord) -> None:
        self._images().flatten(volume.name)

    def parent(self, volume: VolumeRecord) -> str | None:
        return _parent(self._images().info(volume.name))


def _parent(info: ImageInfo) -> str | None:
    if info.parent is None:
        return None
    _, image, snapshot = info.parent
    return f"{image}@{snapshot}"


def _texts(record: PoolRecord) -> Mapping[str, str]:
    """The options that are texts; paths must be absolute, since gateways are started anywhere."""
    found = {}
    for name in ("conf", "user", "keyring", "ceph_pool", "namespace", "data_pool"):
        value = record.options.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise InvalidError(f"Option {name} of rbd pool {record.name!r} is {value!r}, not a text.")
        if name in ("conf", "keyring") and not Path(value).is_absolute():
            raise InvalidError(
                f"Option {name} of rbd pool {record.name!r} needs an absolute path, not {value!r}."
            )
        found[name] = value
    if not found.get("user", DEFAULT_USER).startswith("client."):
        raise InvalidError(
            f"The Ceph user {found['user']!r} of pool {record.name!r} must begin with `client.`, as `ceph auth ls` "
            "shows it."
        )
    return found
