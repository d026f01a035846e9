"""A synchronous client of the gateway's control API, for the CLI, tools and tests."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from ringstone import models
from ringstone.errors import RingstoneError, UnreachableError, error_of_code
from ringstone.stats import Snapshot

T = TypeVar("T")

# Long enough for a detach that drains a slow drive.
DEFAULT_TIMEOUT = 60.0

_POOL = TypeAdapter(models.Pool)
_POOLS = TypeAdapter(list[models.Pool])
_VOLUME = TypeAdapter(models.Volume)
_VOLUMES = TypeAdapter(list[models.Volume])
_SNAPSHOT_OF = TypeAdapter(models.Snapshot)
_SNAPSHOTS = TypeAdapter(list[models.Snapshot])
_ATTACHMENT = TypeAdapter(models.Attachment)
_ATTACHMENTS = TypeAdapter(list[models.Attachment])
_REACTOR = TypeAdapter(models.Reactor)
_REACTORS = TypeAdapter(list[models.Reactor])
_EVENTS = TypeAdapter(list[models.Event])
_INFO = TypeAdapter(models.GatewayInfo)
_HEALTH = TypeAdapter(models.Health)
_SNAPSHOT = TypeAdapter(Snapshot)
_NOTHING: TypeAdapter[None] = TypeAdapter(None)


class GatewayClient:
    """Talks to the gateway that listens on `socket`. Methods raise what the gateway answered, as an error of
    ringstone.errors, or UnreachableError when it did not answer within `timeout` seconds. Use it in one
    thread."""

    def __init__(self, socket: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.socket = socket
        self._timeout = timeout
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://gateway/v1", timeout=timeout
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # pools

    def pools(self) -> list[models.Pool]:
        return self._get(_POOLS, "/pools")

    def pool(self, name: str) -> models.Pool:
        return self._get(_POOL, f"/pools/{_name(name)}")

    def create_pool(self, pool: models.PoolCreate) -> models.Pool:
        return self._call(_POOL, "POST", "/pools", body=pool.model_dump(exclude_none=True))

    def delete_pool(self, name: str) -> None:
        self._call(_NOTHING, "DELETE", f"/pools/{_name(name)}")

    # volumes

    def volumes(self, *, pool: str | None = None) -> list[models.Volume]:
        return self._get(_VOLUMES, "/volumes", pool=pool)

    def volume(self, name: str) -> models.Volume:
        return self._get(_VOLUME, f"/volumes/{_name(name)}")

    def create_volume(
        self, name: str, *, pool: str, size: int | None, block_size: int = 512
    ) -> models.Volume:
        """`size` in bytes; None only where the pool is one block device."""
        body = {"name": name, "pool": pool, "size": size, "block_size": block_size}
        return self._call(_VOLUME, "POST", "/volumes", body=body)

    def resize_volume(self, name: str, size: int) -> models.Volume:
        """`size` in bytes, larger than now."""
        return self._call(_VOLUME, "PATCH", f"/volumes/{_name(name)}", body={"size": size})

    def delete_volume(self, name: str) -> None:
        self._call(_NOTHING, "DELETE", f"/volumes/{_name(name)}")

    # snapshots

    def snapshots(self, volume: str) -> list[models.Snapshot]:
        """Oldest first."""
        return self._get(_SNAPSHOTS, f"/volumes/{_name(volume)}/snapshots")

    def create_snapshot(self, volume: str, name: str) -> models.Snapshot:
        return self._call(_SNAPSHOT_OF, "POST", f"/volumes/{_name(volume)}/snapshots", body={"name": name})

    def delete_snapshot(self, volume: str, name: str) -> None:
        self._call(_NOTHING, "DELETE", f"/volumes/{_name(volume)}/snapshots/{_name(name)}")

    def revert(self, volume: str, snapshot: str) -> None:
        self._call(_NOTHING, "POST", f"/volumes/{_name(volume)}/snapshots/{_name(snapshot)}/revert")

    def clone_snapshot(self, volume: str, snapshot: str, new: str) -> models.Volume:
        path = f"/volumes/{_name(volume)}/snapshots/{_name(snapshot)}/clone"
        return self._call(_VOLUME, "POST", path, body={"name": new})

    def flatten(self, volume: str) -> None:
        self._call(_NOTHING, "POST", f"/volumes/{_name(volume)}/flatten")

    # attachments

    def attachments(self) -> list[models.Attachment]:
        return self._get(_ATTACHMENTS, "/attachments")

    def attachment(self, volume: str) -> models.Attachment:
        return self._get(_ATTACHMENT, f"/attachments/{_name(volume)}")

    def attach(
        self,
        volume: str,
        *,
        socket: str | None = None,
        queues: int | None = None,
        read_only: bool = False,
        ha: bool = False,
        take_over: bool = False,
    ) -> models.Attachment:
        """Defaults as models.AttachmentCreate."""
        body = {
            "volume": volume,
            "socket": socket,
            "queues": queues,
            "read_only": read_only,
            "ha": ha,
            "take_over": take_over,
        }
        return self._call(_ATTACHMENT, "POST", "/attachments", body=body)

    def detach(self, volume: str, *, force: bool = False) -> None:
        self._call(_NOTHING, "DELETE", f"/attachments/{_name(volume)}", query={"force": force})

    def move_queue(self, volume: str, queue: int, core: int) -> None:
        self._call(_NOTHING, "PUT", f"/attachments/{_name(volume)}/queues/{queue}", body={"core": core})

    def share(self, volume: str, shared: bool) -> models.Attachment:
        """Whether a second frontend may connect, for a live migration."""
        return self._call(
            _ATTACHMENT, "PUT", f"/attachments/{_name(volume)}/sharing", body={"shared": shared}
        )

    # reactors

    def reactors(self) -> list[models.Reactor]:
        return self._get(_REACTORS, "/reactors")

    def add_reactor(self, core: int) -> models.Reactor:
        return self._call(_REACTOR, "POST", "/reactors", body={"core": core})

    def remove_reactor(self, core: int) -> None:
        self._call(_NOTHING, "DELETE", f"/reactors/{core}")

    # the gateway

    def stats(self, *, volume: str | None = None) -> Snapshot:
        return self._get(_SNAPSHOT, "/stats", volume=volume)

    def info(self) -> models.GatewayInfo:
        return self._get(_INFO, "/gateway")

    def health(self) -> models.Health:
        return self._get(_HEALTH, "/health")

    def events(self, *, limit: int = 100, volume: str | None = None) -> list[models.Event]:
        """Oldest first."""
        return self._get(_EVENTS, "/events", limit=limit, volume=volume)

    # transport

    def _get(self, answer: TypeAdapter[T], path: str, **query: str | int | None) -> T:
        return self._call(answer, "GET", path, query=query)

    def _call(
        self,
        answer: TypeAdapter[T],
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> T:
        asked = {name: value for name, value in (query or {}).items() if value is not None}
        try:
            response = self._http.request(method, path, json=body, params=asked)
        except httpx.TimeoutException as error:
            raise UnreachableError(
                f"The gateway at {self.socket} did not answer within {self._timeout:g} seconds. "
                "Look at its log; guests are served all the same."
            ) from error
        except httpx.TransportError as error:
            raise UnreachableError(self._unreachable(error)) from error
        if not response.is_success:
            raise self._failure(response)
        content = response.content or b"null"
        try:
            return answer.validate_json(content)
        except ValidationError as error:
            raise RingstoneError(
                f"The gateway at {self.socket} answered {method} {path} with something else than this "
                "Ringstone "
                "expects. Use the same version for both."
            ) from error

    def _unreachable(self, error: httpx.TransportError) -> str:
        if not self.socket.exists():
            return (
                f"No gateway runs at {self.socket}: there is no such socket. Start it with `ringstone "
                "gateway` or "
                "`systemctl start ringstone-gateway`, or name its socket with --socket or RINGSTONE_SOCKET."
            )
        if "Errno 13" in str(error):
            return (
                f"{self.socket} may not be opened by this user; run the command as the gateway's user (root)."
            )
        return (
            f"The gateway at {self.socket} does not answer ({error}). Start it with `ringstone gateway` or "
            "`systemctl start ringstone-gateway`."
        )

    def _failure(self, response: httpx.Response) -> RingstoneError:
        try:
            body = models.ErrorBody.model_validate_json(response.content)
        except ValidationError:
            return RingstoneError(
                f"What listens on {self.socket} answered {response.status_code} and is no Ringstone gateway; "
                "check --socket."
            )
        return error_of_code(body.code, body.message)


def _name(name: str) -> str:
    """As one segment of a path. A dot segment would be resolved away on the client's side, so its dots are
    coded too."""
    coded = quote(name, safe="")
    return coded.replace(".", "%2E") if coded in (".", "..") else coded or "%00"
