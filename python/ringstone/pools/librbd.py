"""The door to the engine's binding of librbd: its calls with Python's types and the project's errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ringstone import _engine
from ringstone.errors import error_of_code
from ringstone.pools.base import Snapshot


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """`owners`: addresses of the clients that have its exclusive lock. `parent`: pool, image and snapshot."""

    size: int
    owners: tuple[str, ...]
    parent: tuple[str, str, str] | None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _engine.EngineError as error:
        message = str(error)
        raise error_of_code(error.code, f"{message[:1].upper()}{message[1:]}.") from error


class Images:
    """The images of a Ceph pool. Connections are kept while somebody uses them, so making one of these is cheap on a
    host that has volumes open. Every call waits for the cluster."""

    def __init__(self, *, conf: str, user: str, keyring: str | None, pool: str, namespace: str) -> None:
        with _translated():
            self._images = _engine.RbdImages(
                conf=conf, user=user, keyring=keyring, pool=pool, namespace=namespace
            )

    def identity(self) -> str:
        """The cluster's id and the pool's number in it."""
        with _translated():
            return self._images.identity()

    def client(self) -> str:
        """What the cluster calls this connection; a blocklist names it."""
        with _translated():
            return self._images.client()

    def retire(self) -> None:
        """Nobody new shares this connection."""
        self._images.retire()

    def usage(self) -> tuple[int, int]:
        """Raw bytes of the cluster: total and free."""
        with _translated():
            return self._images.usage()

    def create(self, image: str, size: int, *, order: int | None, data_pool: str) -> None:
        with _translated():
            self._images.create(image, size, order=order, data_pool=data_pool)

    def remove(self, image: str) -> None:
        with _translated():
            self._images.remove(image)

    def resize(self, image: str, size: int) -> None:
        with _translated():
            self._images.resize(image, size)

    def info(self, image: str) -> ImageInfo:
        with _translated():
            found = self._images.info(image)
        return ImageInfo(found["size"], tuple(found["owners"]), found["parent"])

    def snapshots(self, image: str) -> list[Snapshot]:
        with _translated():
            found = self._images.snapshots(image)
        return [Snapshot(one["name"], one["size"], one["created_s"]) for one in found]

    def create_snapshot(self, image: str, snapshot: str) -> None:
        with _translated():
            self._images.create_snapshot(image, snapshot)

    def remove_snapshot(self, image: str, snapshot: str) -> None:
        with _translated():
            self._images.remove_snapshot(image, snapshot)

    def revert(self, image: str, snapshot: str) -> None:
        with _translated():
            self._images.revert(image, snapshot)

    def clone(self, parent: str, snapshot: str, image: str, *, order: int | None, data_pool: str) -> None:
        with _translated():
            self._images.clone_image(parent, snapshot, image, order=order, data_pool=data_pool)

    def flatten(self, image: str) -> None:
        with _translated():
            self._images.flatten(image)
