"""A manager, or the gateway of another host, as a side of the control API: over the network, with TLS and a token."""

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from ringstone.certificates import trusting
from ringstone.errors import (
    ForbiddenError,
    InvalidError,
    RingstoneError,
    UnauthorizedError,
    UnreachableError,
    UntrustedError,
    error_of_os,
)
from ringstone.peer import Ended, Late, NoAnswer, NotSent, Peer


class RemotePeer(Peer):
    """At `url`, such as https://10.0.0.1:7481. Connections are kept open in it."""

    def __init__(
        self,
        url: str,
        *,
        token: str,
        ca: Path | None,
        timeout: float,
        connect_timeout: float | None,
        name: str | None,
        server_name: str | None,
        transport: httpx2.BaseTransport | None,
    ) -> None:
        """As those of ringstone.client.RemoteClient."""
        plain = url.rstrip("/")
        super().__init__(name or f"the server at {plain}", timeout)
        parts = httpx2.URL(plain)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise InvalidError(f"{url!r} is no URL; write one such as https://10.0.0.1:7481.")
        self._http = httpx2.Client(
            base_url=f"{plain}/v1",
            timeout=httpx2.Timeout(timeout, connect=connect_timeout or timeout),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            verify=_trusted(ca, server_name) if parts.scheme == "https" and transport is None else True,
            transport=transport,
            # The token is for nobody on the way.
            trust_env=False,
        )
        self._server_name = server_name
        # What httpcore2 has the TLS library compare the certificate with.
        self._extensions = {"sni_hostname": server_name} if server_name is not None else {}

    def close(self) -> None:
        self._http.close()

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, Any]
    ) -> tuple[int, bytes]:
        try:
            answer = self._http.request(method, path, json=body, params=query, extensions=self._extensions)
        except (httpx2.ConnectTimeout, httpx2.ConnectError, httpx2.PoolTimeout) as error:
            raise NotSent(_told(error)) from error
        except httpx2.TimeoutException as error:
            raise Late(_told(error)) from error
        except httpx2.RemoteProtocolError as error:
            raise Ended(_told(error)) from error
        except httpx2.TransportError as error:
            raise NoAnswer(_told(error)) from error
        return answer.status_code, answer.content

    def _unreachable(self, error: NoAnswer) -> RingstoneError:
        told = str(error)
        if "Hostname mismatch" in told or "IP address mismatch" in told:
            if self._server_name is not None:
                return UntrustedError(
                    f"The certificate of {self.name} is not for {self._server_name!r} ({told}), so it was sent "
                    f"nothing. Give it one with DNS:{self._server_name} as a subjectAltName."
                )
            return UntrustedError(
                f"The certificate of {self.name} is for another name ({told}). Use a URL with a name that the "
                "certificate has, or give the server a certificate with this one as a subjectAltName."
            )
        if "CERTIFICATE_VERIFY_FAILED" in told:
            return UntrustedError(
                f"The certificate of {self.name} is not signed by anybody known here ({told}). Name the file with "
                "its authority's certificate with --ca or RINGSTONE_CA (a manager: gateway_ca), or renew it."
            )
        if "WRONG_VERSION_NUMBER" in told or "record layer failure" in told.lower():
            return UnreachableError(
                f"{self.sentence_name} speaks no TLS. Use http:// in its URL if that is meant, or set tls_cert and "
                "tls_key on that server."
            )
        if isinstance(error, Ended):
            return UnreachableError(
                f"{self.sentence_name} ended the connection ({told}). Use https:// in the URL where the server has a "
                "certificate; otherwise look at its log."
            )
        return UnreachableError(
            f"{self.sentence_name} does not answer ({told}). See that it runs (`systemctl status`) and that its "
            "address is reachable from here, or name another with --manager or RINGSTONE_MANAGER."
        )

    def _stranger(self, status: int) -> RingstoneError:
        return RingstoneError(
            f"{self.sentence_name} answered {status} and is nothing of Ringstone's; check the URL."
        )

    def _failure(self, status: int, content: bytes) -> RingstoneError:
        found = super()._failure(status, content)
        if isinstance(found, UnauthorizedError | ForbiddenError):
            return type(found)(f"{self.sentence_name} refuses: {found.message}")
        return found


def _told(error: httpx2.TransportError) -> str:
    return str(error) or type(error).__name__


def _trusted(ca: Path | None, server_name: str | None) -> ssl.SSLContext:
    try:
        context = trusting(ca)
    except ssl.SSLError as error:
        raise InvalidError(f"{ca} has no certificates (PEM): {error}. Correct --ca or gateway_ca.") from error
    except OSError as error:
        raise error_of_os(error, f"reading {ca}", "Correct --ca or gateway_ca.") from error
    context.hostname_checks_common_name = server_name is None
    return context
