"""What becomes of a guest's volumes while it moves: on one host two QEMUs are connected to each, between hosts each
changes its owner when the guest has come.

Either way at most one QEMU's requests are answered at any moment, and that is not left to the migration's order: the
gateway lets one frontend run its queues, and the storage lets one host write.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from ringstone import models
from ringstone.errors import BusyError, InvalidError, NotFoundError, RingstoneError

# For the gateway to notice that a QEMU has gone.
_DISCONNECT_SECONDS = 10.0
_PAUSE_SECONDS = 0.05


class Disks(ABC):
    """The steps of a move in their order. Those of the end say what they did, or what is left to do, in words for a
    person."""

    @abstractmethod
    def prepare(self) -> str:
        """Let the destination's QEMU connect."""

    def switch(self) -> None:  # noqa: B027
        """The guest has left the source, and what it asks of its disks at the destination waits for this."""

    @abstractmethod
    def take_back(self) -> list[str]:
        """The guest stays at the source, and the destination's QEMU was ended. Never after switch()."""

    @abstractmethod
    def finish(self) -> list[str]:
        """The guest has moved, and the source's QEMU was ended. What is left to do."""

    @abstractmethod
    def keep(self) -> list[str]:
        """The guest has moved, and the source's QEMU is left paused. What is left to do."""


class SharesVolumes(Protocol):
    """What is needed of the gateway; ringstone.client.GatewayClient has it."""

    def share(self, volume: str, shared: bool) -> models.Attachment: ...


class SharedDisks(Disks):
    """Both QEMUs are on this host."""

    def __init__(self, gateway: SharesVolumes, volumes: Sequence[str]) -> None:
        self._gateway = gateway
        self._volumes = volumes
        self._shared: list[str] = []

    def prepare(self) -> str:
        for volume in self._volumes:
            self._gateway.share(volume, True)
            self._shared.append(volume)
        return "The volumes take a second frontend."

    def take_back(self) -> list[str]:
        return [said for said, _ in self._unshare_all("the destination's QEMU")]

    def finish(self) -> list[str]:
        return [said for said, done in self._unshare_all("the source's QEMU") if not done]

    def keep(self) -> list[str]:
        return [
            f"volume {volume} takes a second frontend until the source's QEMU has ended; then run "
            f"`ringstone volume share {volume} --off`"
            for volume in self._shared
        ]

    def _unshare_all(self, other: str) -> list[tuple[str, bool]]:
        said = []
        for volume in self._shared:
            try:
                self._unshare(volume)
            except RingstoneError as error:
                left = (
                    f"volume {volume} still takes a second frontend ({error.message}): once {other} has ended, run "
                    f"`ringstone volume share {volume} --off`"
                )
                said.append((left, False))
            else:
                said.append((f"volume {volume} is for one frontend again", True))
        return said

    def _unshare(self, volume: str) -> None:
        """Once the gateway has noticed that one has gone. BusyError when it has not."""
        deadline = time.monotonic() + _DISCONNECT_SECONDS
        while True:
            try:
                self._gateway.share(volume, False)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_SECONDS)
            else:
                return


class AttachesVolumes(Protocol):
    """What is needed of the manager; ringstone.client.RemoteClient has it."""

    def attachment(self, volume: str) -> models.Attachment: ...
    def create_attachment(self, request: models.AttachmentCreate) -> models.Attachment: ...
    def release(self, volume: str) -> models.Attachment: ...
    def detach(self, volume: str, *, force: bool = False, host: str | None = None) -> None: ...


class MovedDisks(Disks):
    """The destination's QEMU is on `host`. Volumes are in pools that both hosts reach."""

    def __init__(self, manager: AttachesVolumes, volumes: Sequence[str], host: str) -> None:
        self._manager = manager
        self._volumes = volumes
        self._host = host
        # As they were at the source.
        self._before: dict[str, models.Attachment] = {}

    def prepare(self) -> str:
        for volume in self._volumes:
            before = self._manager.attachment(volume)
            if before.host == self._host:
                raise InvalidError(
                    f"Volume {volume!r} is attached on host {self._host!r} already; leave --to-host out for a move "
                    "there."
                )
            request = models.AttachmentCreate(
                volume=volume,
                host=self._host,
                queues=before.queues,
                incoming=True,
                socket_owner=before.socket_owner,
                socket_group=before.socket_group,
                socket_mode=before.socket_mode,
            )
            self._manager.create_attachment(request)
            self._before[volume] = before
        return f"Host {self._host} waits for the guest."

    def switch(self) -> None:
        for number, (volume, before) in enumerate(self._before.items()):
            request = models.AttachmentCreate(volume=volume, host=self._host, ha=before.ha, take_over=True)
            try:
                # Its frontend stays connected: a QEMU whose vhost-user device is disconnected while the guest stands
                # still does not use it any more (7.2), and a person may have to go back.
                self._manager.release(volume)
                self._manager.create_attachment(request)
            except RingstoneError as error:
                raise RingstoneError(self._stuck(volume, before, error, alone=number == 0)) from error

    def _stuck(self, volume: str, before: models.Attachment, error: RingstoneError, *, alone: bool) -> str:
        """`alone`: no other volume has followed the guest, which has therefore written nothing yet."""
        back = (
            f"; or end the destination's QEMU, attach it with `--host {before.host} --take-over`, and resume the "
            "source"
        )
        return (
            f"The guest runs on host {self._host}, and what it asks of volume {volume} waits, as that host could not "
            f"take it over ({error.message.rstrip('.')}). Try again with `ringstone volume attach {volume} --host "
            f"{self._host} --take-over`{back if alone else ''}"
        )

    def take_back(self) -> list[str]:
        said = []
        for volume, before in self._before.items():
            try:
                # There is none where the destination's gateway was ended meanwhile.
                with contextlib.suppress(NotFoundError, InvalidError):
                    self._manager.detach(volume, force=True, host=self._host)
                said.append(f"volume {volume} is host {before.host}'s as before")
            except RingstoneError as error:
                said.append(f"{self._end_listening(volume, self._host)} ({error.message})")
        return said

    def finish(self) -> list[str]:
        left = []
        for volume, before in self._before.items():
            try:
                self._manager.detach(volume, force=True, host=before.host)
            except RingstoneError as error:
                left.append(f"{self._end_listening(volume, before.host)} ({error.message})")
        return left

    def keep(self) -> list[str]:
        return [
            f"{self._end_listening(volume, before.host)}, once the source's QEMU has ended"
            for volume, before in self._before.items()
        ]

    def _end_listening(self, volume: str, host: str) -> str:
        return f"host {host} still listens for volume {volume}: run `ringstone volume detach {volume} --host {host}`"
