"""Runs in the guest, in a service's place: tries what the service has no business with. A line of JSON says what became
of each thing, "done" or the error."""

import ctypes
import errno
import json
import mmap
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
# Of x86-64.
SYS_INIT_MODULE, SYS_BPF = 175, 321
CLONE_NEWNS = 0x20000
BPF_MAP_CREATE, BPF_MAP_TYPE_ARRAY = 0, 2


def call(function: str, *arguments: object) -> int:
    """A function of the C library; OSError as Python's own do."""
    result: int = getattr(LIBC, function)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def write(path: str) -> None:
    Path(path).write_text("")
    Path(path).unlink()


def in_child(act: Callable[[], object]) -> None:
    """What would stay with this process."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, os.strerror(code))


def mount() -> None:
    with tempfile.TemporaryDirectory() as place:
        call("mount", b"none", place.encode(), b"tmpfs", 0, None)
        call("umount", place.encode())


def change_mode(mode: int) -> None:
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, mode)


def give_away() -> None:
    """By fchownat(2), as sockets are; chown(2) is for nobody."""
    with tempfile.NamedTemporaryFile() as file:
        folder = os.open("/", os.O_PATH)
        try:
            os.chown(file.name, 65534, 65534, dir_fd=folder)
        finally:
            os.close(folder)


def give_away_of_the_hosts() -> None:
    """Whose it is already: nothing is changed where it is allowed."""
    folder = os.open("/etc", os.O_PATH)
    try:
        os.chown("hostname", 0, 0, dir_fd=folder)
    finally:
        os.close(folder)


def load_module() -> None:
    """Of nothing: ENOEXEC is the answer to who may."""
    try:
        call("syscall", SYS_INIT_MODULE, b"x", 1, b"")
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise


def make_bpf_map() -> None:
    """An array of one entry."""
    attributes = struct.pack("IIII", BPF_MAP_TYPE_ARRAY, 4, 4, 1)
    os.close(call("syscall", SYS_BPF, BPF_MAP_CREATE, attributes, len(attributes)))


def open_file(path: str, flags: int = os.O_RDONLY) -> None:
    os.close(os.open(path, flags))


def open_disk() -> None:
    assert Path("/sys/block/vda").exists()
    open_file("/dev/vda")


def write_code() -> None:
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


ACTS: dict[str, Callable[[], object]] = {
    "change the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
    "change the host's name": lambda: socket.sethostname(socket.gethostname()),
    "give a file below /etc to another user": give_away_of_the_hosts,
    "give a file to another user": give_away,
    "listen to the network's packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "load a kernel module": load_module,
    "look into another process": lambda: open_file("/proc/1/mem", os.O_RDWR),
    "make a BPF map": make_bpf_map,
    "make a namespace": lambda: in_child(lambda: call("unshare", CLONE_NEWNS)),
    "make a set-user-id file": lambda: change_mode(0o4700),
    "make code at run time": write_code,
    "mount": mount,
    "open a disk": open_disk,
    "open the kernel's log": lambda: open_file("/dev/kmsg"),
    "read a home directory": lambda: open_file("/root/secret"),
    "run in real time": lambda: in_child(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))),
    "write below /etc": lambda: write("/etc/ringstone-probe"),
    "write below /srv": lambda: write("/srv/ringstone-probe"),
    "write below /usr": lambda: write("/usr/ringstone-probe"),
    "write below /var": lambda: write("/var/ringstone-probe"),
}


def outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return f"refused: {error.strerror}"
    return "done"


print(json.dumps({what: outcome(act) for what, act in ACTS.items()}))
