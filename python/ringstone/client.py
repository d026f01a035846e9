"""Synchronous clients of the control API, for the CLI, tools and tests: of a gateway on this host, and of a manager or
another host's gateway over the network."""

import ssl
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from ringstone import models
from ringstone.errors import (
    ForbiddenError,
    InvalidError,
    RingstoneError,
    UnauthorizedError,
    UnreachableError,
    UntrustedError,
    error_of_code,
    error_of_os,
)
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
_HOST = TypeAdapter(models.Host)
_HOSTS = TypeAdapter(list[models.Host])
_MANAGER = TypeAdapter(models.ManagerInfo)
_NOTHING: TypeAdapter[None] = TypeAdapter(None)


class ApiClient(ABC):
    """Every call there is. Methods raise what was answered, as an error of ringstone.errors, or UnreachableError when
    nothing was within `timeout` seconds. Use it in one thread."""

    def __init__(self, http: httpx.Client, peer: str, timeout: float) -> None:
        """`peer` is how messages name the other side, with its article."""
        self.peer = peer
        self._http = http
        # Of each request, for httpx.
        self._extensions: dict[str, Any] = {}
        self._timeout = timeout

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
        return self._call(_POOL, "POST", "/pools", body=pool.model_dump(exclude_defaults=True))

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

    # hosts, which only a manager has

    def hosts(self) -> list[models.Host]:
        return self._get(_HOSTS, "/hosts")

    def host(self, name: str) -> models.Host:
        return self._get(_HOST, f"/hosts/{_name(name)}")

    def remove_host(self, name: str) -> None:
        self._call(_NOTHING, "DELETE", f"/hosts/{_name(name)}")

    def manager(self) -> models.ManagerInfo:
        return self._get(_MANAGER, "/manager")

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
        return self._call(_ATTACHMENT, "POST", "/attachments", body=body)

    def detach(self, volume: str, *, force: bool = False, host: str | None = None) -> None:
        """`host`: of an incoming attachment; otherwise it is detached where it is attached."""
        query = {"force": force, "host": host}
        self._call(_NOTHING, "DELETE", f"/attachments/{_name(volume)}", query=query)

    def move_queue(self, volume: str, queue: int, core: int) -> None:
        self._call(_NOTHING, "PUT", f"/attachments/{_name(volume)}/queues/{queue}", body={"core": core})

    def share(self, volume: str, shared: bool) -> models.Attachment:
        """Whether a second frontend may connect, for a live migration."""
        return self._call(
            _ATTACHMENT, "PUT", f"/attachments/{_name(volume)}/sharing", body={"shared": shared}
        )

    def release(self, volume: str) -> models.Attachment:
        """Let another host own it, whose guest stands still on its way there."""
        return self._call(_ATTACHMENT, "POST", f"/attachments/{_name(volume)}/release")

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
            response = self._http.request(method, path, json=body, params=asked, extensions=self._extensions)
        except (httpx.ConnectTimeout, httpx.ConnectError, httpx.PoolTimeout) as error:
            failure = self._unreachable(error)
            if isinstance(failure, UnreachableError):
                failure.sent = False
            raise failure from error
        except httpx.TimeoutException as error:
            raise UnreachableError(
                f"{self._sentence_peer} did not answer within {self._timeout:g} seconds. "
                "Look at its log; guests are served all the same."
            ) from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise self._failure(response)
        content = response.content or b"null"
        try:
            return answer.validate_json(content)
        except ValidationError as error:
            raise RingstoneError(
                f"{self._sentence_peer} answered {method} {path} with something else than this Ringstone "
                "expects. Use the same version for both."
            ) from error

    @property
    def _sentence_peer(self) -> str:
        return self.peer[:1].upper() + self.peer[1:]

    @abstractmethod
    def _unreachable(self, error: httpx.TransportError) -> RingstoneError:
        """What to tell of it."""

    @abstractmethod
    def _stranger(self, status: int) -> RingstoneError:
        """For an answer with `status` that is none of Ringstone's."""

    def _failure(self, response: httpx.Response) -> RingstoneError:
        try:
            body = models.ErrorBody.model_validate_json(response.content)
        except ValidationError:
            return self._stranger(response.status_code)
        found = error_of_code(body.code, body.message)
        if isinstance(found, UntrustedError):
            # Of somebody behind it; this one has the request.
            found.sent = True
        return found


class GatewayClient(ApiClient):
    """Talks to the gateway of this host, which listens on `socket`."""

    def __init__(self, socket: Path, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.socket = socket
        transport = httpx.HTTPTransport(uds=str(socket))
        http = httpx.Client(transport=transport, base_url="http://gateway/v1", timeout=timeout)
        super().__init__(http, f"the gateway at {socket}", timeout)

    def _unreachable(self, error: httpx.TransportError) -> RingstoneError:
        if not self.socket.exists():
            return UnreachableError(
                f"No gateway runs at {self.socket}: there is no such socket. Start it with `ringstone "
                "gateway` or `systemctl start ringstone-gateway`, or name its socket with --socket or "
                "RINGSTONE_SOCKET."
            )
        if "Errno 13" in str(error):
            return UnreachableError(
                f"{self.socket} may not be opened by this user; run the command as the gateway's user (root)."
            )
        return UnreachableError(
            f"The gateway at {self.socket} does not answer ({error}). Start it with `ringstone gateway` or "
            "`systemctl start ringstone-gateway`."
        )

    def _stranger(self, status: int) -> RingstoneError:
        return RingstoneError(
            f"What listens on {self.socket} answered {status} and is no Ringstone gateway; check --socket."
        )


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
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`peer` is how messages name the other side. `server_name`: what the server's certificate must be for, instead
        of what stands in the URL; as a subjectAltName, a common name is not enough. `transport` is for tests."""
        self.url = url.rstrip("/")
        parts = httpx.URL(self.url)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise InvalidError(f"{url!r} is no URL; write one such as https://10.0.0.1:7481.")
        http = httpx.Client(
            base_url=f"{self.url}/v1",
            timeout=httpx.Timeout(timeout, connect=connect_timeout or timeout),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=_trusted(ca, server_name) if parts.scheme == "https" and transport is None else True,
            transport=transport,
            # The token is for nobody on the way.
            trust_env=False,
        )
        super().__init__(http, peer or f"the server at {self.url}", timeout)
        self._server_name = server_name
        if server_name is not None:
            # What httpcore has the TLS library compare the certificate with.
            self._extensions["sni_hostname"] = server_name

    def _unreachable(self, error: httpx.TransportError) -> RingstoneError:
        told = str(error) or type(error).__name__
        if "Hostname mismatch" in told or "IP address mismatch" in told:
            if self._server_name is not None:
                return UntrustedError(
                    f"The certificate of {self.peer} is not for {self._server_name!r} ({told}), so it was sent "
                    f"nothing. Give it one with DNS:{self._server_name} as a subjectAltName."
                )
            return UntrustedError(
                f"The certificate of {self.peer} is for another name ({told}). Use a URL with a name that the "
                "certificate has, or give the server a certificate with this one as a subjectAltName."
            )
        if "CERTIFICATE_VERIFY_FAILED" in told:
            return UntrustedError(
                f"The certificate of {self.peer} is not signed by anybody known here ({told}). Name the file with "
                "its authority's certificate with --ca or RINGSTONE_CA (a manager: gateway_ca), or renew it."
            )
        if "WRONG_VERSION_NUMBER" in told or "record layer failure" in told.lower():
            return UnreachableError(
                f"{self._sentence_peer} speaks no TLS. Use http:// in its URL if that is meant, or set tls_cert and "
                "tls_key on that server."
            )
        if isinstance(error, httpx.RemoteProtocolError):
            return UnreachableError(
                f"{self._sentence_peer} ended the connection ({told}). Use https:// in the URL where the server has a "
                "certificate; otherwise look at its log."
            )
        return UnreachableError(
            f"{self._sentence_peer} does not answer ({told}). See that it runs (`systemctl status`) and that its "
            "address is reachable from here, or name another with --manager or RINGSTONE_MANAGER."
        )

    def _stranger(self, status: int) -> RingstoneError:
        return RingstoneError(
            f"{self._sentence_peer} answered {status} and is nothing of Ringstone's; check the URL."
        )

    def _failure(self, response: httpx.Response) -> RingstoneError:
        found = super()._failure(response)
        if isinstance(found, UnauthorizedError | ForbiddenError):
            return type(found)(f"{self._sentence_peer} refuses: {found.message}")
        return found


def _trusted(ca: Path | None, server_name: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
    except ssl.SSLError as error:
        raise InvalidError(f"{ca} has no certificates (PEM): {error}. Correct --ca or gateway_ca.") from error
    except OSError as error:
        raise error_of_os(error, f"reading {ca}", "Correct --ca or gateway_ca.") from error
    context.hostname_checks_common_name = server_name is None
    return context


def _name(name: str) -> str:
    """As one segment of a path. A dot segment would be resolved away on the client's side, so its dots are
    coded too."""
    coded = quote(name, safe="")
    return coded.replace(".", "%2E") if coded in (".", "..") else coded or "%00"
