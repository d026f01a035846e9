"""Synchronous clients of the control API, for the CLI, tools and tests: of a gateway on this host, and of a manager or
another host's gateway over the network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from ringstone import models
from ringstone.errors import RingstoneError
from ringstone.peer import DEFAULT_TIMEOUT, GatewayPeer, Peer

# Commands of a person import this file: what only some of them need is imported where it is used.
if TYPE_CHECKING:
    import httpx2

    from ringstone.stats import Snapshot

__all__ = ["DEFAULT_TIMEOUT", "ApiClient", "GatewayClient", "RemoteClient"]

T = TypeVar("T")


class ApiClient:
    """Every call there is. Methods raise what was answered, as an error of ringstone.errors, or UnreachableError when
    nothing was within `timeout` seconds. Use it in one thread."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    @property
    def peer(self) -> str:
        """How messages name the other side, with its article."""
        return self._peer.name

    def close(self) -> None:
        self._peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # pools

    def pools(self) -> list[models.Pool]:
        return self._get(list[models.Pool], "/pools")

    def pool(self, name: str) -> models.Pool:
        return self._get(models.Pool, f"/pools/{_name(name)}")

    def create_pool(self, pool: models.PoolCreate) -> models.Pool:
        return self._call(models.Pool, "POST", "/pools", body=pool.model_dump(exclude_defaults=True))

    def grow_pool(self, name: str, size: int | None = None) -> models.Pool:
        """Use all of its drive; a file is made `size` bytes long before."""
        body = {} if size is None else {"size": size}
        return self._call(models.Pool, "POST", f"/pools/{_name(name)}/grow", body=body)

    def rekey_pool(self, name: str, key: models.PoolRekey) -> models.Pool:
        """Have another key wrap the keys of its encrypted volumes."""
        body = key.model_dump(exclude_none=True)
        return self._call(models.Pool, "POST", f"/pools/{_name(name)}/rekey", body=body)

    def scrub_pool(self, name: str, rate: int | None = None) -> models.Pool:
        """Begin to read all that it has in use, `rate` bytes a second."""
        body = {} if rate is None else {"rate": rate}
        return self._call(models.Pool, "POST", f"/pools/{_name(name)}/scrub", body=body)

    def cancel_scrub(self, name: str) -> None:
        self._call(NoneType, "DELETE", f"/pools/{_name(name)}/scrub")

    def delete_pool(self, name: str) -> None:
        self._call(NoneType, "DELETE", f"/pools/{_name(name)}")

    # volumes

    def volumes(self, *, pool: str | None = None) -> list[models.Volume]:
        return self._get(list[models.Volume], "/volumes", pool=pool)

    def volume(self, name: str) -> models.Volume:
        return self._get(models.Volume, f"/volumes/{_name(name)}")

    def create_volume(
        self,
        name: str,
        *,
        pool: str,
        size: int | None,
        block_size: int = 512,
        integrity: bool = False,
        encryption: bool = False,
    ) -> models.Volume:
        """`size` in bytes; None only where the pool is one block device. `integrity`: each block has a checksum,
        `encryption`: each is encrypted, both in a store pool."""
        body = {"name": name, "pool": pool, "size": size, "block_size": block_size}
        # A release before does not know of these.
        body |= {"integrity": True} if integrity else {}
        body |= {"encryption": True} if encryption else {}
        return self._call(models.Volume, "POST", "/volumes", body=body)

    def resize_volume(self, name: str, size: int) -> models.Volume:
        """`size` in bytes, larger than now."""
        return self._call(models.Volume, "PATCH", f"/volumes/{_name(name)}", body={"size": size})

    def delete_volume(self, name: str) -> None:
        self._call(NoneType, "DELETE", f"/volumes/{_name(name)}")

    # snapshots

    def snapshots(self, volume: str) -> list[models.Snapshot]:
        """Oldest first."""
        return self._get(list[models.Snapshot], f"/volumes/{_name(volume)}/snapshots")

    def create_snapshot(self, volume: str, name: str, *, also: Sequence[str] = ()) -> models.Snapshot:
        """`also`: further volumes of the same store pool, at the same point."""
        # A release before does not know of others.
        body = {"name": name, "also": list(also)} if also else {"name": name}
        return self._call(models.Snapshot, "POST", f"/volumes/{_name(volume)}/snapshots", body=body)

    def delete_snapshot(self, volume: str, name: str) -> None:
        self._call(NoneType, "DELETE", f"/volumes/{_name(volume)}/snapshots/{_name(name)}")

    def deletions(self, volume: str) -> list[models.Deletion]:
        """Deleted snapshots that have blocks still."""
        return self._get(list[models.Deletion], f"/volumes/{_name(volume)}/deletions")

    def keep_snapshot(self, volume: str, name: str) -> models.Snapshot:
        """Take a deletion back; BusyError when blocks of the snapshot are given up."""
        return self._call(models.Snapshot, "POST", f"/volumes/{_name(volume)}/snapshots/{_name(name)}/keep")

    def reclaimable(self, volume: str) -> list[models.Reclaimable]:
        """What deleting each snapshot, alone, would free."""
        return self._get(list[models.Reclaimable], f"/volumes/{_name(volume)}/reclaimable")

    def revert(self, volume: str, snapshot: str) -> None:
        self._call(NoneType, "POST", f"/volumes/{_name(volume)}/snapshots/{_name(snapshot)}/revert")

    def clone_snapshot(self, volume: str, snapshot: str, new: str) -> models.Volume:
        path = f"/volumes/{_name(volume)}/snapshots/{_name(snapshot)}/clone"
        return self._call(models.Volume, "POST", path, body={"name": new})

    def clone_volume(self, volume: str, new: str) -> models.Volume:
        """Of what it holds now, in a store pool."""
        return self._call(models.Volume, "POST", f"/volumes/{_name(volume)}/clone", body={"name": new})

    def diff(self, volume: str, *, since: str | None = None, until: str | None = None) -> models.Difference:
        """What has changed from snapshot `since` (from nothing) to snapshot `until` (to now), in a store pool."""
        query = {"since": since, "until": until}
        return self._call(models.Difference, "GET", f"/volumes/{_name(volume)}/diff", query=query)

    def flatten(self, volume: str) -> None:
        self._call(NoneType, "POST", f"/volumes/{_name(volume)}/flatten")

    # hosts, which only a manager has

    def hosts(self) -> list[models.Host]:
        return self._get(list[models.Host], "/hosts")

    def host(self, name: str) -> models.Host:
        return self._get(models.Host, f"/hosts/{_name(name)}")

    def remove_host(self, name: str) -> None:
        self._call(NoneType, "DELETE", f"/hosts/{_name(name)}")

    def manager(self) -> models.ManagerInfo:
        return self._get(models.ManagerInfo, "/manager")

    # attachments

    def attachments(self) -> list[models.Attachment]:
        return self._get(list[models.Attachment], "/attachments")

    def attachment(self, volume: str) -> models.Attachment:
        return self._get(models.Attachment, f"/attachments/{_name(volume)}")

    def attach(
        self,
        volume: str,
        *,
        socket: str | None = None,
        queues: int | None = None,
        read_only: bool = False,
        ha: bool = False,
        take_over: bool = False,
        incoming: bool = False,
        host: str | None = None,
        socket_owner: str | None = None,
        socket_group: str | None = None,
        socket_mode: str | None = None,
    ) -> models.Attachment:
        """Defaults as models.AttachmentCreate."""
        request = models.AttachmentCreate(
            volume=volume,
            socket=socket,
            queues=queues,
            read_only=read_only,
            ha=ha,
            take_over=take_over,
            incoming=incoming,
            host=host,
            socket_owner=socket_owner,
            socket_group=socket_group,
            socket_mode=socket_mode,
        )
        return self.create_attachment(request)

    def create_attachment(self, request: models.AttachmentCreate) -> models.Attachment:
        # A release before does not know of what is not set.
        body = request.model_dump(exclude_none=True)
        return self._call(models.Attachment, "POST", "/attachments", body=body)

    def detach(self, volume: str, *, force: bool = False, host: str | None = None) -> None:
        """`host`: of an incoming attachment; otherwise it is detached where it is attached."""
        query = {"force": force, "host": host}
        self._call(NoneType, "DELETE", f"/attachments/{_name(volume)}", query=query)

    def move_queue(self, volume: str, queue: int, core: int) -> None:
        self._call(NoneType, "PUT", f"/attachments/{_name(volume)}/queues/{queue}", body={"core": core})

    def share(self, volume: str, shared: bool) -> models.Attachment:
        """Whether a second frontend may connect, for a live migration."""
        return self._call(
            models.Attachment, "PUT", f"/attachments/{_name(volume)}/sharing", body={"shared": shared}
        )

    def release(self, volume: str) -> models.Attachment:
        """Let another host own it, whose guest stands still on its way there."""
        return self._call(models.Attachment, "POST", f"/attachments/{_name(volume)}/release")

    # reactors

    def reactors(self) -> list[models.Reactor]:
        return self._get(list[models.Reactor], "/reactors")

    def add_reactor(self, core: int) -> models.Reactor:
        return self._call(models.Reactor, "POST", "/reactors", body={"core": core})

    def remove_reactor(self, core: int) -> None:
        self._call(NoneType, "DELETE", f"/reactors/{core}")

    # the gateway

    def stats(self, *, volume: str | None = None) -> "Snapshot":
        from ringstone.stats import Snapshot

        return self._get(Snapshot, "/stats", volume=volume)

    def info(self) -> models.GatewayInfo:
        return self._get(models.GatewayInfo, "/gateway")

    def health(self) -> models.Health:
        return self._get(models.Health, "/health")

    def events(self, *, limit: int = 100, volume: str | None = None) -> list[models.Event]:
        """Oldest first."""
        return self._get(list[models.Event], "/events", limit=limit, volume=volume)

    # transport

    def _get(self, answer: type[T], path: str, **query: str | int | None) -> T:
        return self._call(answer, "GET", path, query=query)

    def _call(
        self,
        answer: type[T],
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> T:
        content = self._peer.ask(method, path, body=body, query=query) or b"null"
        try:
            return _adapter(answer).validate_json(content)
        except ValidationError as error:
            raise RingstoneError(
                f"{self._peer.sentence_name} answered {method} {path} with something else than this Ringstone "
                "expects. Use the same version for both."
            ) from error


class GatewayClient(ApiClient):
    """Talks to the gateway of this host, which listens on `socket`."""

    def __init__(self, socket: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.socket = socket
        super().__init__(GatewayPeer(socket, timeout))


class RemoteClient(ApiClient):
    """Talks to a manager, or to the gateway of another host, at `url`, such as https://10.0.0.1:7481. `ca`: a file with
    the certificates (PEM) that the server's may be signed with; by default the system's."""

    def __init__(
        self,
        url: str,
        *,
        token: str,
        ca: Path | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        connect_timeout: float | None = None,
        peer: str | None = None,
        server_name: str | None = None,
        transport: "httpx2.BaseTransport | None" = None,
    ) -> None:
        """`peer` is how messages name the other side. `server_name`: what the server's certificate must be for, instead
        of what stands in the URL; as a subjectAltName, a common name is not enough. `transport` is for tests."""
        from ringstone.remote_peer import RemotePeer

        self.url = url.rstrip("/")
        remote = RemotePeer(
            url,
            token=token,
            ca=ca,
            timeout=timeout,
            connect_timeout=connect_timeout,
            name=peer,
            server_name=server_name,
            transport=transport,
        )
        super().__init__(remote)


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(answer: type[T]) -> TypeAdapter[T]:
    """Each is made when it is first needed: a command of a person needs one or two of them."""
    if answer not in _adapters:
        _adapters[answer] = TypeAdapter(answer)
    return _adapters[answer]


def _name(name: str) -> str:
    """As one segment of a path. A dot segment would be resolved away on the client's side, so its dots are
    coded too."""
    coded = quote(name, safe="")
    return coded.replace(".", "%2E") if coded in (".", "..") else coded or "%00"
