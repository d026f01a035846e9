"""Keys of pools: which file, command or credential has one, and the key that it has.

A key is 32 bytes, or their 64 hexadecimal digits. It wraps the keys of the pool's encrypted volumes, and is read
each time that one of these is made or opened.
"""

import os
import re
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ringstone.errors import DeniedError, FailedError, InvalidError, RingstoneError, error_of_os
from ringstone.pools.base import KeySource
from ringstone.state.records import JsonValue

KEY_BYTES = 32
# Names of options of a pool, of which it has one or none.
KINDS = ("key_file", "key_command", "key_credential")
COMMAND_SECONDS = 10.0
MAKE_ONE = "`openssl rand -hex 32` makes one"

_LONGEST = 4096
# What a command said is kept for a moment: a gateway that starts opens many volumes, each of which would wait for a
# command that hangs.
_KEPT_SECONDS = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def of(options: Mapping[str, JsonValue]) -> KeySource | None:
    """InvalidError for more than one, and for one that cannot be."""
    given = [(kind, options[kind]) for kind in KINDS if options.get(kind) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidError("A pool has one key: name a file, a command or a credential.")
    kind, place = given[0]
    if not isinstance(place, str):
        raise InvalidError(f"{kind} is {place!r}, which is no text.")
    if kind == "key_file":
        if not os.path.isabs(place):
            raise InvalidError(f"{place!r} is no absolute path of a key's file.")
    elif not _NAME.fullmatch(place):
        what = "command" if kind == "key_command" else "credential"
        raise InvalidError(
            f"{place!r} is no name of a {what}: letters, digits, dots, dashes and underscores, at most 63 of them."
        )
    return KeySource(kind, place)


class Keys:
    """Reads keys. `commands`: the folder of programs that may be asked for one. Who may make pools may have one of
    these run, and no other."""

    def __init__(self, commands: Path = Path("/etc/ringstone/key-commands")) -> None:
        self.commands = commands
        self._lock = threading.Lock()
        self._told: dict[str, _Told] = {}

    def read(self, source: KeySource) -> bytes:
        """The 32 bytes. DeniedError when others may read the key too, FailedError when it cannot be had, InvalidError
        when it is no key."""
        match source.kind:
            case "key_file":
                text = _content(Path(source.place))
            case "key_credential":
                text = _credential(source.place)
            case _:
                text = self._tell(source.place)
        return _key_in(text, source)

    def _tell(self, name: str) -> bytes:
        with self._lock:
            told = self._told.setdefault(name, _Told())
        # Others wait for the one that asks.
        with told.lock:
            if told.at is None or time.monotonic() - told.at > _KEPT_SECONDS:
                try:
                    told.answer = _run(self.commands / name)
                except RingstoneError as error:
                    told.answer = error
                told.at = time.monotonic()
        if isinstance(told.answer, RingstoneError):
            raise told.answer
        return told.answer

    def forget(self) -> None:
        """Ask every command again."""
        with self._lock:
            self._told.clear()


@dataclass(slots=True)
class _Told:
    answer: bytes | RingstoneError = b""
    at: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


KEYS = Keys()


def _key_in(text: bytes, source: KeySource) -> bytes:
    if len(text) == KEY_BYTES:
        return text
    digits = text.strip()
    if len(digits) == 2 * KEY_BYTES:
        with suppress(ValueError, UnicodeDecodeError):
            return bytes.fromhex(digits.decode("ascii"))
    raise InvalidError(
        f"The {source} holds {len(text)} bytes, which are no key: it has to be 32 bytes, or their 64 hexadecimal "
        f"digits; {MAKE_ONE}."
    )


def _content(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _refuse_open_to_others(path, os.fstat(fd))
            return os.read(fd, _LONGEST)
        finally:
            os.close(fd)
    except OSError as error:
        raise error_of_os(
            error,
            f"reading the key {path}",
            "Name the file that has the pool's key, and mount what it is on.",
        ) from error


def _refuse_open_to_others(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise InvalidError(f"{path} is no file, so there is no key in it.")
    if stat.S_IMODE(found.st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        raise DeniedError(
            f"Others than its owner may read or change the key {path}; run `chmod 600 {path}`, and change the key if "
            "the machine has other users."
        )
    if found.st_uid not in (0, os.geteuid()):
        raise DeniedError(
            f"The key {path} is another user's; run `chown root {path}`, and change the key if that user is not to "
            "have it."
        )


def _credential(name: str) -> bytes:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    remedy = (
        f"Add LoadCredential={name}:/path/of/the/key, or LoadCredentialEncrypted, to the gateway's unit "
        "(`systemctl edit ringstone-gateway`), and restart it."
    )
    if folder is None:
        raise FailedError(f"The gateway was given no credentials, and {name!r} is to be one. {remedy}")
    try:
        with (Path(folder) / name).open("rb") as file:
            return file.read(_LONGEST)
    except OSError as error:
        raise error_of_os(error, f"reading the credential {name!r}", remedy) from error


def _run(program: Path) -> bytes:
    _refuse_strange(program)
    try:
        process = subprocess.Popen(
            [program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise error_of_os(
            error, f"running {program}", "It has to be a program, or to begin with #!."
        ) from error
    with process:
        try:
            said, complaint = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired as error:
            _end(process)
            raise FailedError(
                f"The key's command {program} said nothing within {COMMAND_SECONDS:g} s and was ended; run it by hand "
                "to see what it waits for."
            ) from error
    if process.returncode != 0:
        lines = complaint.decode(errors="replace").split("\n")
        why = next((line.strip() for line in reversed(lines) if line.strip()), "it did not say why")[:200]
        raise FailedError(
            f"The key's command {program} failed with exit status {process.returncode}: {why.rstrip('.')}. Run it by "
            "hand until it prints the key."
        )
    return said[:_LONGEST]


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started. Whoever holds its pipes still is not waited for."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _refuse_strange(program: Path) -> None:
    """What others may change runs as they like."""
    try:
        for path in (program, program.parent):
            found = path.stat()
            if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise DeniedError(
                    f"Others may change {path}, and the gateway would run what they like; run `chown root {path}` and "
                    f"`chmod go-w {path}`."
                )
    except OSError as error:
        raise error_of_os(
            error,
            f"looking for the key's command {program}",
            f"Put a program that prints the key into {program.parent}, or a link to it.",
        ) from error
