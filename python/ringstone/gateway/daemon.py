"""The process `ringstone gateway`: what is started, in which order, and how it ends.

Lock, state, engine, restored attachments: guests get their disks back first. Only then is the control API
imported, which takes longer than all before it, and started. After that Python only waits for requests, events
and signals; only the look at pools' space runs by the clock here, and the watchdog is the engine's.
"""

import fcntl
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from ringstone.errors import ExistsError, GoneError, RingstoneError, error_of_os
from ringstone.gateway.checks import check_socket
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.engine import Engine
from ringstone.gateway.events import EventLog
from ringstone.gateway.handover import (
    API,
    API_TCP,
    Arrival,
    HandoverServer,
    Upgrade,
    adopt_locks,
    lent,
    take_over,
    take_over_stderr,
)
from ringstone.gateway.identity import this_host
from ringstone.gateway.logs import set_up_logging
from ringstone.gateway.membership import Membership
from ringstone.gateway.notify import watchdog_address
from ringstone.gateway.rejoin import rejoin
from ringstone.gateway.service import Service
from ringstone.gateway.starts import Starts, hold_back
from ringstone.state import Store
from ringstone.state.settings import check_store, is_away, open_store
from ringstone.stopping import hold_stop_signals

log = logging.getLogger("ringstone.gateway")


@dataclass(slots=True)
class _Begun:
    """An engine that serves, and what belongs to it. `locks`: descriptors by path. `tcp`: the API's listener there."""

    engine: Engine
    store: Store
    locks: dict[Path, int]
    tcp: socket.socket | None
    arrival: Arrival | None = None

    @property
    def upgrade(self) -> Upgrade | None:
        return self.arrival.upgrade if self.arrival else None


def run_gateway(config: GatewayConfig, *, takeover: bool = False) -> None:
    """Run until SIGTERM or SIGINT, or until another process has taken over. Errors of ringstone.errors before
    the API is up; the engine is stopped in any case. With `takeover`, go on with what the gateway that runs
    serves; NotFoundError when none does."""
    set_up_logging(config.log_level)
    check_socket(config.socket)
    config.socket_rights.ids()
    started_ns = time.time_ns()
    # Before Python's threads keep off the reactors' CPUs.
    usable_cores = len(os.sched_getaffinity(0) | set(config.cores))
    starts = Starts(config.run_dir / "starts")
    with ExitStack() as stack:
        _raise_limits()
        _make_directories(config)
        begun = _take_over(config, stack) if takeover else _start(config, starts, stack)
        if begun is None:
            log.info("The gateway has stopped.")
            return
        watchdog = watchdog_address()
        if watchdog is not None:
            begun.engine.watchdog(*watchdog)
        service = Service(
            begun.store,
            begun.engine,
            EventLog(),
            run_dir=config.run_dir,
            state_dir=config.state_dir,
            reactors=len(config.cores),
            host=config.host,
            allow_test_pools=config.allow_test_pools,
            socket_dirs=config.socket_dirs,
            socket_rights=config.socket_rights,
        )
        membership = None
        if config.etcd is not None:
            # First: what another machine of the same name serves must not be taken for this one's.
            rejoining = partial(rejoin, service) if is_away(begun.store) else None
            membership = Membership(service, this_host(config, usable_cores), rejoin=rejoining)
            stack.callback(membership.stop)
            membership.start(serving=begun.arrival is not None)
        if begun.arrival is not None:
            service.adopt()
        else:
            service.restore()
        if membership is not None:
            membership.follow()
        if service.waits_for_backings:
            stack.enter_context(_waiting_for_backings(service, config.backing_wait_s))
        stack.callback(service.space.stop)
        service.space.start()
        successor = _serve_api(config, begun, service, started_ns, stack)
    if successor.failed:
        raise GoneError(
            "The upgrade was lost after the word to go. Start the gateway again: no request is lost."
        )
    if not successor.left:
        starts.forget()
    log.info("The gateway has %s.", "been taken over" if successor.left else "stopped")


def _start(config: GatewayConfig, starts: Starts, stack: ExitStack) -> _Begun | None:
    """None when it was told to stop while it waited after too many crashes. What the API over TCP lacks is told before
    anything is served: it is easily put right then."""
    locks = {path: stack.enter_context(sole_gateway(path)) for path in config.locks}
    if not hold_back(starts):
        return None
    tcp = None
    if config.listening is not None:
        config.listening.check()
        tcp = stack.enter_context(config.listening.bind())
    # From here on guests are served, so a stop waits until the API's loop can do it in order.
    hold_stop_signals()
    _leave_cores_to_reactors(config)
    store = open_store(config.database, config.host, config.etcd, memory=config.state_dir / "owned.json")
    stack.callback(store.close)
    engine = Engine(
        config.cores, idle_us=config.idle_us, stats_path=config.stats_path, balance=config.balance
    )
    stack.callback(engine.stop)
    return _Begun(engine, store, locks, tcp)


def _take_over(config: GatewayConfig, stack: ExitStack) -> _Begun:
    # Whatever can go wrong or take long comes first: guests wait for nothing of it.
    import_module("ringstone.gateway.server")
    check_store(config.database, config.etcd)
    if config.listening is not None:
        config.listening.check()
    hold_stop_signals()
    _leave_cores_to_reactors(config)
    arrival = take_over(config)
    stack.callback(arrival.engine.stop)
    locks = adopt_locks(config, arrival)
    take_over_stderr(arrival)
    store = open_store(config.database, config.host, config.etcd, memory=config.state_dir / "owned.json")
    stack.callback(store.close)
    return _Begun(arrival.engine, store, locks, _tcp_listener(config, arrival), arrival)


def _tcp_listener(config: GatewayConfig, arrival: Arrival) -> socket.socket | None:
    """The one that was handed over, unless the API is to be somewhere else now."""
    listener = arrival.listener(API_TCP)
    wanted = config.listening
    if listener is not None:
        if wanted is not None and listener.getsockname()[:2] == wanted.sockaddr:
            return listener
        listener.close()
    try:
        return wanted.bind() if wanted else None
    except RingstoneError as error:
        # Guests are served and do not depend on it.
        log.error("The API is not served over TCP: %s", error)
        return None


def _serve_api(
    config: GatewayConfig, begun: _Begun, service: Service, started_ns: int, stack: ExitStack
) -> HandoverServer:
    """Until the gateway is told to stop, or a successor serves."""
    # Late on purpose: see above.
    from ringstone.gateway.server import ApiServer, listen

    listener = (begun.arrival.listener(API) if begun.arrival else None) or listen(config.socket)
    api = ApiServer(config, service, begun.engine, listener, begun.tcp, started_ns, begun.upgrade)
    descriptors = lent(config, begun.locks, listener, begun.tcp)
    successor = HandoverServer(config, begun.engine, service, descriptors, api.leave)
    successor.start()
    stack.callback(successor.stop)
    if begun.upgrade is not None:
        service.events.say(
            "info",
            f"Took {begun.upgrade.volumes} volumes over from release {begun.upgrade.from_version}; their requests "
            f"paused for {begun.upgrade.stall_ns / 1e6:.1f} ms.",
        )
    api.run()
    return successor


@contextmanager
def _waiting_for_backings(service: Service, seconds: float) -> Iterator[None]:
    """On a thread of its own, so that neither the other volumes nor the API wait for these."""
    stop = threading.Event()
    thread = threading.Thread(
        name="backings", target=service.wait_for_backings, args=(seconds, stop), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _raise_limits() -> None:
    """A queue takes some descriptors and a guest's memory some more: all that the system allows, as the soft
    limit is low for programs that use select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_directories(config: GatewayConfig) -> None:
    for path, mode in ((config.state_dir, 0o700), (config.run_dir, 0o755), (config.socket.parent, 0o755)):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise error_of_os(
                error,
                f"making the directory {path}",
                "Run as root, or choose another with --state-dir and --run-dir.",
            ) from error


@contextmanager
def sole_gateway(path: Path) -> Iterator[int]:
    """Hold the lock at `path` for as long as this process lives; ExistsError when another gateway does."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise error_of_os(error, f"opening {path}", "Check the directory's permissions.") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            raise ExistsError(
                f"A gateway (process {holder}) already runs in {path.parent}; stop it first, or give this "
                "one its own "
                "--run-dir and --state-dir."
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield fd
    finally:
        os.close(fd)


def _leave_cores_to_reactors(config: GatewayConfig) -> None:
    """Python, and the threads it starts, run elsewhere where there is an elsewhere: a request to the API must
    not take turns with a reactor. The reactors bind themselves."""
    rest = os.sched_getaffinity(0) - set(config.cores)
    if rest:
        os.sched_setaffinity(0, rest)
