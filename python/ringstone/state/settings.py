"""Where the state is, as the gateway's configuration says it, and how a store is opened from that. Nothing of etcd is
imported unless it is used."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ringstone.errors import InvalidError
from ringstone.loopback import is_loopback
from ringstone.state.base import Store
from ringstone.state.sqlite import SqliteStore

DEFAULT_PREFIX = "/ringstone/"


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """`endpoints`: URLs of members, tried in turn. `ca`, `cert` and `key`: PEM files for https. `prefix`: all keys
    begin with it. `attempt_s`: how long one member may take to answer; `total_s`: how long a call may take with
    all of them before it fails."""

    endpoints: tuple[str, ...]
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password_file: Path | None = None
    prefix: str = DEFAULT_PREFIX
    attempt_s: float = 3.0
    total_s: float = 10.0

    def __post_init__(self) -> None:
        for endpoint in self.endpoints:
            _check_endpoint(endpoint)
        if not self.endpoints:
            raise InvalidError("etcd names no member; write URLs such as https://10.0.0.1:2379.")
        if not self.prefix.startswith("/") or not self.prefix.endswith("/") or len(self.prefix) < 3:
            raise InvalidError(f"etcd_prefix is {self.prefix!r}; write one such as {DEFAULT_PREFIX}.")
        if (self.cert is None) != (self.key is None):
            raise InvalidError("etcd_cert and etcd_key belong together; set both or none.")
        if (self.user is None) != (self.password_file is None):
            raise InvalidError("etcd_user and etcd_password_file belong together; set both or none.")
        if self.password_file is not None:
            for endpoint in self.endpoints:
                _check_private(endpoint)

    @property
    def where(self) -> str:
        return ", ".join(self.endpoints)


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError:
        sound = False
    if not sound or parts.path or parts.query or parts.username:
        raise InvalidError(
            f"etcd has {endpoint!r}, which is no member's URL; write one such as https://10.0.0.1:2379."
        )


def _check_private(endpoint: str) -> None:
    parts = urlsplit(endpoint)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise InvalidError(
            f"etcd has {endpoint!r} with a password but without TLS, so that everybody on the way reads it. Write "
            "https URLs and set etcd_ca; or 127.0.0.1, where the member runs on this machine."
        )


def open_store(database: Path, host: str, etcd: EtcdSettings | None, *, memory: Path | None = None) -> Store:
    """The store in etcd, or without it the database at `database`, all of which is then `host`'s. `memory`: the file
    in which `host` keeps what it owns, for starts without etcd."""
    if etcd is not None and memory is not None:
        from ringstone.state.remembered import RememberingStore

        return RememberingStore(etcd, memory, host)
    if etcd is not None:
        from ringstone.state.etcd import EtcdStore

        return EtcdStore(etcd)
    store = SqliteStore(database)
    try:
        store.rename_host(host)
    except BaseException:
        store.close()
        raise
    return store


def is_away(store: Store) -> bool:
    """Whether the state is in etcd and that has not answered yet: then there is only what this host remembers."""
    return getattr(store, "away", False) is True


def refuse_away(store: Store) -> None:
    """UnreachableError before anything is done that would end in a change of the state."""
    refuse = getattr(store, "refuse_changes", None)
    if refuse is not None:
        refuse()


def check_store(database: Path, etcd: EtcdSettings | None) -> None:
    """StateError when this release could not use the state, which is left as it is."""
    if etcd is None:
        SqliteStore.check(database)
        return
    from ringstone.state.etcd import EtcdStore

    EtcdStore.check(etcd)
