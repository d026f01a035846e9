"""The process `ringstone gateway`: what is started, in which order, and how it ends.

Lock, state, engine, restored attachments: guests get their disks back first. Only then is the control API
imported, which takes longer than all before it, and started. After that Python only waits for requests, events
and signals; nothing here runs by the clock, and the watchdog is the engine's.
"""

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ringstone.errors import ExistsError, error_of_os
from ringstone.gateway.checks import check_socket
from ringstone.gateway.config import GatewayConfig
from ringstone.gateway.engine import Engine
from ringstone.gateway.events import EventLog
from ringstone.gateway.logs import set_up_logging
from ringstone.gateway.notify import watchdog_address
from ringstone.gateway.service import Service
from ringstone.gateway.starts import STOP_SIGNALS, Starts, hold_back
from ringstone.store import SqliteStore

log = logging.getLogger("ringstone.gateway")


def run_gateway(config: GatewayConfig) -> None:
    """Run until SIGTERM or SIGINT. Errors of ringstone.errors before the API is up; the engine is stopped in
    any case."""
    set_up_logging(config.log_level)
    check_socket(config.socket)
    started_ns = time.time_ns()
    with ExitStack() as stack:
        _make_directories(config)
        for path in config.locks:
            stack.enter_context(_sole_gateway(path))
        starts = Starts(config.run_dir / "starts")
        if not hold_back(starts):
            log.info("The gateway has stopped.")
            return
        # From here on guests are served, so a stop waits until the API's loop can do it in order.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        _leave_cores_to_reactors(config)
        store = SqliteStore(config.database)
        stack.callback(store.close)
        engine = Engine(config.cores, idle_us=config.idle_us, stats_path=config.stats_path)
        stack.callback(engine.stop)
        watchdog = watchdog_address()
        if watchdog is not None:
            engine.watchdog(*watchdog)
        events = EventLog()
        service = Service(
            store,
            engine,
            events,
            run_dir=config.run_dir,
            state_dir=config.state_dir,
            reactors=len(config.cores),
            allow_test_pools=config.allow_test_pools,
        )
        service.restore()
        if service.waits_for_backings:
            stack.enter_context(_waiting_for_backings(service, config.backing_wait_s))
        # Late on purpose: see above.
        from ringstone.gateway.server import serve_api

        serve_api(config, service, engine, started_ns)
    starts.forget()
    log.info("The gateway has stopped.")


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
def _sole_gateway(path: Path) -> Iterator[None]:
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
        yield
    finally:
        os.close(fd)


def _leave_cores_to_reactors(config: GatewayConfig) -> None:
    """Python, and the threads it starts, run elsewhere where there is an elsewhere: a request to the API must
    not take turns with a reactor. The reactors bind themselves."""
    rest = os.sched_getaffinity(0) - set(config.cores)
    if rest:
        os.sched_setaffinity(0, rest)
