"""A signal at whatever moment: what was started is ended, once and whole."""

import subprocess
import sys

import pytest

# A lab of which only the moments are real: it is told by a signal to stop at those that were asked for.
LAB = """
import os, signal, sys
from contextlib import contextmanager
from types import SimpleNamespace
import ringstone.cli.lab as cli
import ringstone.lab.lab as module
from ringstone.errors import RingstoneError

moments = set(sys.argv.pop(1).split(","))
said = lambda word: os.write(2, (word + "\\n").encode())

def at(moment):
    said(moment)
    if moment in moments:
        moments.discard(moment)
        os.kill(os.getpid(), signal.SIGTERM)

class Lab(module.Lab):
    def _start_network(self, steps):
        self._undo += [lambda: said("removed"), lambda: at("removing")]
        at("starting")
        if "failing" in moments:
            raise RingstoneError("It does not start.")
    def _start_nothing(self, steps): pass
    _start_etcd = _start_ceph = _start_hosts = _start_managers = _start_nothing

def describe(lab):
    at("started")
    return {}

def told(*_, **__):
    at("said")

module.Lab = Lab
cli._describe = describe
cli.print_json = told
wait = signal.sigwait
def sigwait(numbers):
    at("waiting")
    return wait(numbers)
signal.sigwait = sigwait
from ringstone.cli import main
sys.argv[1:] = ["lab", "--json"]
main()
"""


def run_lab(moments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", LAB, moments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("moment", ["started", "said", "waiting", "started,removing", "waiting,removing"])
def test_a_lab_that_runs_ends_in_order(moment: str) -> None:
    """A lab that was told to stop as soon as it had said that it runs ended with 143 and not with 0: its handler for
    the start was there until it waited."""
    status, said = run_lab(moment)
    assert status == 0, said
    assert "removed" in said


@pytest.mark.parametrize(
    ("moment", "expected"), [("starting", 143), ("starting,removing", 143), ("failing,removing", 143)]
)
def test_a_lab_that_starts_is_removed_whole(moment: str, expected: int) -> None:
    """Also where the signal comes while one that failed to start is being removed."""
    status, said = run_lab(moment)
    assert status == expected, said
    assert "removed" in said


DAEMON = """
import asyncio, os, signal, threading
from ringstone.stopping import SIGNALS, hold_stop_signals, stopped_by_signals

def tell():
    for number in SIGNALS:
        os.kill(os.getpid(), number)

async def serve():
    stop = asyncio.Event()
    with stopped_by_signals(asyncio.get_running_loop(), stop.set):
        await stop.wait()
        tell()
    tell()

hold_stop_signals()
tell()
forever = threading.Event()
threading.Thread(target=forever.wait, daemon=True).start()
asyncio.run(serve())
# To a thread that holds nothing back.
tell()
print("in order")
"""


def test_a_daemon_is_told_once_and_ends_in_order() -> None:
    """A signal behind the first one ended gateway and manager while they ended, by the default disposition."""
    done = subprocess.run(
        [sys.executable, "-c", DAEMON], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "in order\n", "")
