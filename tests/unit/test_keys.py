"""Keys of pools: where they come from, and what is no key."""

import os
import time
from pathlib import Path

import pytest

from ringstone.errors import DeniedError, FailedError, InvalidError, RingstoneError
from ringstone.pools import KeySource, keys
from ringstone.pools.keys import Keys
from ringstone.state.records import JsonValue

KEY = bytes(range(32))


def in_file(path: Path, content: bytes = KEY, mode: int = 0o600) -> KeySource:
    path.write_bytes(content)
    path.chmod(mode)
    return KeySource("key_file", str(path))


def command(folder: Path, script: str, mode: int = 0o700) -> KeySource:
    program = folder / "vault"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(mode)
    return KeySource("key_command", "vault")


@pytest.mark.parametrize(
    "content",
    [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n", b" " + KEY.hex().encode() + b"\r\n"],
)
def test_a_key_is_32_bytes_or_their_digits(tmp_path: Path, content: bytes) -> None:
    assert Keys().read(in_file(tmp_path / "key", content)) == KEY


@pytest.mark.parametrize(
    "content", [b"", b"secret\n", KEY[:31], KEY + b"\n", b"g" * 64, KEY.hex().encode() * 2]
)
def test_what_is_no_key_is_told_and_not_shown(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(
        InvalidError, match=f"holds {len(content)} bytes, which are no key.*openssl rand"
    ) as caught:
        Keys().read(in_file(tmp_path / "key", content))
    assert len(content) < 6 or content.decode("latin-1").strip() not in caught.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_or_change_is_none(tmp_path: Path, mode: int) -> None:
    source = in_file(tmp_path / "key", mode=mode)
    with pytest.raises(DeniedError, match="chmod 600"):
        Keys().read(source)


def test_a_key_of_another_user_is_none(tmp_path: Path) -> None:
    source = in_file(tmp_path / "key")
    os.chown(source.place, 12345, -1)
    with pytest.raises(DeniedError, match=r"another user's.*chown root"):
        Keys().read(source)


def test_what_is_no_file_holds_no_key(tmp_path: Path) -> None:
    with pytest.raises(RingstoneError, match=r"Reading the key .*none failed"):
        Keys().read(KeySource("key_file", str(tmp_path / "none")))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(InvalidError, match="no file"):
        Keys().read(KeySource("key_file", str(tmp_path / "pipe")))


def test_a_command_prints_the_key_and_is_asked_once_for_many_volumes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = command(tmp_path, f"echo asked >> {log}; echo {KEY.hex()}")
    known = Keys(tmp_path)
    assert [known.read(source) for _ in range(3)] == [KEY] * 3
    assert log.read_text() == "asked\n"
    known.forget()
    assert known.read(source) == KEY
    assert log.read_text() == "asked\n" * 2


def test_a_command_sees_nothing_of_the_gateways_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    source = command(tmp_path, f'test -z "$TOKEN" && test "$(cat)" = "" && echo {KEY.hex()}')
    assert Keys(tmp_path).read(source) == KEY


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    source = command(tmp_path, "echo one >&2; echo the vault is sealed. >&2; exit 3")
    with pytest.raises(FailedError, match=r"exit status 3: the vault is sealed\. Run it by hand"):
        Keys(tmp_path).read(source)


def test_a_command_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "COMMAND_SECONDS", 0.3)
    pids = tmp_path / "pids"
    source = command(tmp_path, f"sleep 1000 & echo $! > {pids}; echo $$ >> {pids}; wait")
    known = Keys(tmp_path)
    for _ in range(2):
        with pytest.raises(FailedError, match=r"said nothing within 0\.3 s"):
            known.read(source)
    started = [int(pid) for pid in pids.read_text().split()]
    # The second time it was not asked again.
    assert len(started) == 2
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_program_that_others_may_change_is_not_run(tmp_path: Path) -> None:
    source = command(tmp_path, f"echo {KEY.hex()}", mode=0o722)
    with pytest.raises(DeniedError, match=r"Others may change .*vault"):
        Keys(tmp_path).read(source)
    command(tmp_path, f"echo {KEY.hex()}")
    tmp_path.chmod(0o777)
    with pytest.raises(DeniedError, match="Others may change"):
        Keys(tmp_path).read(source)


def test_a_command_that_is_not_there_or_no_program(tmp_path: Path) -> None:
    with pytest.raises(RingstoneError, match="Put a program that prints the key into"):
        Keys(tmp_path).read(KeySource("key_command", "vault"))
    (tmp_path / "vault").write_bytes(b"\0not a program")
    (tmp_path / "vault").chmod(0o700)
    with pytest.raises(RingstoneError, match=r"Running .*vault failed.*begin with #!"):
        Keys(tmp_path).read(KeySource("key_command", "vault"))


def test_a_credential_is_what_systemd_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KeySource("key_credential", "pool.key")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(FailedError, match=r"LoadCredential=pool\.key"):
        Keys().read(source)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(RingstoneError, match=r"LoadCredential=pool\.key"):
        Keys().read(source)
    (tmp_path / "pool.key").write_bytes(KEY.hex().encode())
    assert Keys().read(source) == KEY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_file": "/a", "key_command": "b"}, "one key"),
        ({"key_file": "relative"}, "no absolute path"),
        ({"key_file": 7}, "no text"),
        ({"key_command": "/bin/sh"}, "no name of a command"),
        ({"key_command": ".."}, "no name of a command"),
        ({"key_credential": "../key"}, "no name of a credential"),
        ({"key_credential": "a" * 64}, "no name of a credential"),
    ],
)
def test_a_source_that_cannot_be_is_refused(options: dict[str, JsonValue], message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        keys.of(options)


def test_a_pool_may_have_no_key() -> None:
    assert keys.of({"extent": 65536}) is None
    assert str(keys.of({"key_command": "vault"})) == "command vault"
