"""Calls of etcd's JSON gateway (etcd 3.4: /v3/kv, /v3/lease, /v3/watch, /v3/auth), on whichever member answers.

Three things can become of a call: it is answered; it certainly did not reach etcd; or nobody knows, because the
answer was lost. Reads are repeated on the next member. Writes are so only when they certainly did not reach etcd;
otherwise they raise AnswerLost, and the caller finds out (etcd_transaction.py).
"""

import base64
import json
import random
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from ringstone.certificates import trusting
from ringstone.errors import InvalidError, StateError, UnreachableError
from ringstone.private import read_private
from ringstone.state.settings import EtcdSettings

Json = dict[str, Any]

# gRPC status codes, which the gateway passes on: grpc.github.io/grpc/core/md_doc_statuscodes.html
_INVALID_ARGUMENT, _NOT_FOUND, _PERMISSION_DENIED, _EXHAUSTED, _FAILED_PRECONDITION = 3, 5, 7, 8, 9
_OUT_OF_RANGE, _UNAUTHENTICATED = 11, 16
_NO_TOKEN = ("invalid auth token", "revision in header is old")
# How etcd's JSON gateway refuses a certificate, as text where all else is JSON.
_NAMED = b"CommonName of client sending a request against gateway"
_BAD_LOGIN = ("user name is empty", "authentication failed", "user name not found")

_LONGEST_PAUSE_SECONDS = 0.3


class AnswerLost(Exception):
    """The call may have taken effect or not, or may still."""


class _NotSent(Exception):
    """The call certainly has no effect."""


class Refused(Exception):
    """etcd's own answer, an error."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

    @property
    def no_space(self) -> bool:
        return self.code == _EXHAUSTED and "database space exceeded" in self.reason

    @property
    def compacted(self) -> bool:
        return self.code == _OUT_OF_RANGE and "compacted" in self.reason

    @property
    def no_lease(self) -> bool:
        return self.code == _NOT_FOUND and "lease not found" in self.reason


def encode(text: str) -> str:
    """Keys and values cross in base64."""
    return base64.b64encode(text.encode()).decode()


def decode(text: str) -> str:
    return base64.b64decode(text).decode()


class EtcdClient:
    """Usable from any thread."""

    def __init__(self, settings: EtcdSettings) -> None:
        self.settings = settings
        self._password = _password(settings)
        self._current = 0
        self._token: str | None = None
        self._cluster: str | None = None
        # No retries in the transport: whether a call may be repeated is decided here. No proxy of the environment.
        self._http = httpx2.Client(
            verify=_tls(settings), trust_env=False, limits=httpx2.Limits(max_keepalive_connections=8)
        )

    def close(self) -> None:
        self._http.close()

    def read(self, path: str, body: Json) -> Json:
        """A call without effect, or one that may be made twice. Refused, UnreachableError, StateError."""
        return self._call(path, body, again=True)

    def write(self, path: str, body: Json) -> Json:
        """Refused, AnswerLost, and UnreachableError when it certainly was not made."""
        return self._call(path, body, again=False)

    def _call(self, path: str, body: Json, *, again: bool) -> Json:
        deadline = time.monotonic() + self.settings.total_s
        failed = 0
        while True:
            endpoint = self.endpoint()
            try:
                return self._with_token(endpoint, path, body)
            except _NotSent as error:
                reason = str(error)
            except AnswerLost as error:
                self.next_endpoint(endpoint)
                if not again:
                    raise
                reason = str(error)
            self.next_endpoint(endpoint)
            failed += 1
            if time.monotonic() >= deadline:
                raise self.unreachable(reason)
            if failed % len(self.settings.endpoints) == 0:
                # An election takes about a second.
                time.sleep(random.uniform(0.2, 1) * _LONGEST_PAUSE_SECONDS)

    def unreachable(self, reason: str) -> UnreachableError:
        return UnreachableError(
            f"etcd does not answer at {self.settings.where} ({reason}). Check that most of its members run and that "
            "this host reaches them; what is served goes on."
        )

    def endpoint(self) -> str:
        return self.settings.endpoints[self._current % len(self.settings.endpoints)]

    def next_endpoint(self, failed: str) -> None:
        """From now on, unless another thread has moved on already."""
        if self.endpoint() == failed:
            self._current = (self._current + 1) % len(self.settings.endpoints)

    def _with_token(self, endpoint: str, path: str, body: Json) -> Json:
        """A token that has run out is the answer of a call that was not made."""
        try:
            return self._post(endpoint, path, body, self._headers(endpoint))
        except Refused as error:
            if self._password is None or not any(text in error.reason for text in _NO_TOKEN):
                raise _of_person(self.settings, error) from error
        self._token = None
        try:
            return self._post(endpoint, path, body, self._headers(endpoint))
        except Refused as error:
            raise _of_person(self.settings, error) from error

    def _headers(self, endpoint: str) -> dict[str, str]:
        if self._password is None:
            return {}
        token = self._token
        if token is None:
            login = {"name": self.settings.user, "password": self._password}
            try:
                token = str(self._post(endpoint, "/v3/auth/authenticate", login, {})["token"])
            except AnswerLost as error:
                raise _NotSent(str(error)) from error
            self._token = token
        return {"Authorization": token}

    def _post(self, endpoint: str, path: str, body: Json, headers: dict[str, str]) -> Json:
        timeout = httpx2.Timeout(self.settings.attempt_s)
        try:
            response = self._http.post(endpoint + path, json=body, headers=headers, timeout=timeout)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise _NotSent(f"{endpoint}: {error or type(error).__name__}") from error
        except httpx2.HTTPError as error:
            raise AnswerLost(f"{endpoint}: {error or type(error).__name__}") from error
        if response.content.startswith(_NAMED):
            raise StateError(
                f"etcd at {endpoint} refuses the certificate, as it has a common name, which is no login there. Make "
                "one without, such as with -subj /O=Ringstone, and name it in `etcd_cert` and `etcd_key`."
            )
        answer = _object(endpoint, response.content)
        if response.status_code != httpx2.codes.OK:
            raise _refusal(endpoint, answer)
        # Calls that stream put their one answer into an object.
        if isinstance(answer.get("result"), dict):
            answer = answer["result"]
        self._same_cluster(endpoint, answer)
        return answer

    def _same_cluster(self, endpoint: str, answer: Json) -> None:
        cluster = str(answer.get("header", {}).get("cluster_id", ""))
        if self._cluster is None and cluster:
            self._cluster = cluster
        elif cluster and cluster != self._cluster:
            raise StateError(
                f"{endpoint} belongs to another etcd cluster ({cluster}) than the state that was in use "
                f"({self._cluster}). Correct `etcd` in the configuration: all endpoints must be members of one cluster."
            )

    @contextmanager
    def stream(self, path: str, body: Json, quiet_s: float) -> Iterator[httpx2.Response]:
        """The answers of a call that goes on, on the current member; httpx2.ReadTimeout when none comes for `quiet_s`
        seconds."""
        endpoint = self.endpoint()
        timeout = httpx2.Timeout(self.settings.attempt_s, read=quiet_s)
        try:
            headers = self._headers(endpoint)
            with self._http.stream(
                "POST", endpoint + path, json=body, headers=headers, timeout=timeout
            ) as response:
                if response.status_code != httpx2.codes.OK:
                    self._token = None
                    raise AnswerLost(f"{endpoint}: {response.read().decode(errors='replace')}")
                yield response
        except (httpx2.HTTPError, httpx2.StreamError, _NotSent, AnswerLost) as error:
            self.next_endpoint(endpoint)
            raise AnswerLost(f"{endpoint}: {error or type(error).__name__}") from error


def _object(endpoint: str, content: bytes) -> Json:
    answer: Any
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise AnswerLost(f"{endpoint}: what answers there is not etcd")
    return answer


def _refusal(endpoint: str, answer: Json) -> Exception:
    """Refused where etcd has decided; AnswerLost where it has not, or not yet: no leader, a leader that changed, a
    request that timed out."""
    if isinstance(answer.get("error"), dict):
        answer = answer["error"]
    reason = str(answer.get("message") or answer.get("error") or answer)
    code = int(answer.get("code") or answer.get("grpc_code") or 0)
    decided = (
        _INVALID_ARGUMENT,
        _NOT_FOUND,
        _PERMISSION_DENIED,
        _FAILED_PRECONDITION,
        _OUT_OF_RANGE,
        _UNAUTHENTICATED,
    )
    if code in decided or (code == _EXHAUSTED and "database space exceeded" in reason):
        return Refused(code, reason)
    return AnswerLost(f"{endpoint}: {reason}")


def _of_person(settings: EtcdSettings, error: Refused) -> Exception:
    """What a person must put right; everything else goes to the caller as it is."""
    if any(text in error.reason for text in _BAD_LOGIN):
        return StateError(
            f"etcd at {settings.where} refuses the login ({error.reason}). Correct `etcd_user` and "
            "`etcd_password_file` in the configuration."
        )
    if error.code in (_PERMISSION_DENIED, _UNAUTHENTICATED):
        return StateError(
            f"etcd at {settings.where} does not let user {settings.user!r} use {settings.prefix} ({error.reason}). "
            "Grant that user readwrite on this prefix."
        )
    return error


def _password(settings: EtcdSettings) -> str | None:
    if settings.password_file is None:
        return None
    return read_private(settings.password_file, "`etcd_password_file` in the configuration").rstrip("\n")


def _tls(settings: EtcdSettings) -> ssl.SSLContext | bool:
    if not any(endpoint.startswith("https:") for endpoint in settings.endpoints):
        return False
    if settings.key is not None:
        read_private(settings.key, "`etcd_key` in the configuration")
    try:
        context = trusting(settings.ca)
        if settings.cert is not None and settings.key is not None:
            context.load_cert_chain(settings.cert, settings.key)
    except OSError as error:  # also ssl.SSLError
        raise InvalidError(
            f"The certificates for etcd cannot be used: {error}. Correct `etcd_ca`, `etcd_cert` and `etcd_key` in the "
            "configuration."
        ) from error
    return context
