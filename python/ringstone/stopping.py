"""SIGINT and SIGTERM for what ends all that it has started: there is no moment at which a signal leaves half.

Commands unwind (Stopping). Daemons hold the signals back until their loop can take them.
"""

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    # A gateway serves its guests before it has loaded that.
    from asyncio import AbstractEventLoop

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a shell answers for a process that a signal ended.
_SIGNAL_EXIT_CODE = 128


class Stopping:
    """While entered, which only the main thread can do, the first signal unwinds with SystemExit. Later ones are taken
    and change nothing: they would disturb what tidies up."""

    def __init__(self) -> None:
        self._unwinds = True
        self._told = False
        self._former = {number: signal.getsignal(number) for number in SIGNALS}

    def hold(self) -> None:
        """From here on a signal does not unwind; wait() tells of it."""
        self._unwinds = False

    def wait(self) -> None:
        """After hold(): until a signal comes, or has come."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not self._told:
            signal.sigwait(SIGNALS)

    def _take(self, number: int, _: FrameType | None) -> None:
        self._told = True
        if self._unwinds:
            self._unwinds = False
            sys.exit(_SIGNAL_EXIT_CODE + number)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)


def hold_stop_signals() -> None:
    """For this thread and those that it starts from now on. One that comes meanwhile waits for stopped_by_signals()."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextmanager
def stopped_by_signals(loop: "AbstractEventLoop", stop: Callable[[], None]) -> Iterator[None]:
    """In the main thread: the loop calls `stop` for each, also for one that was held back. What comes behind the end of
    this is ignored: the process ends anyway. asyncio's own handlers leave the default disposition behind, by which a
    second signal would end the process in the midst of that."""
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)

    def take() -> None:
        woken.recv(4096)
        stop()

    with woken, wake:
        loop.add_reader(woken, take)
        former = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            signal.set_wakeup_fd(former)
            loop.remove_reader(woken)
