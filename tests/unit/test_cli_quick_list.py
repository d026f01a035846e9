"""The short way to `ringstone volume list` prints what the real command does, and leaves the rest to it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ringstone.cli import list_start, main
from ringstone.cli.app import app
from ringstone.cli.context import CliContext
from ringstone.cli.quick_list import ListFlags, list_flags
from tests.framework.canned import Canned, answer

# What takes long to import, and who would bring it.
SLOW = (
    "typer",
    "pydantic",
    "httpx2",
    "httpcore2",
    "h11",
    "anyio",
    "asyncio",
    "fastapi",
    "importlib.metadata",
)
OURS = (
    "ringstone.client",
    "ringstone.models",
    "ringstone.stats",
    "ringstone.cli.volume",
    "ringstone._engine",
)

ATTACHMENT = {
    "volume": "db",
    "host": "alpha",
    "socket": "/run/ringstone/vhost/db.sock",
    "queues": 1,
    "read_only": False,
    "state": "running",
    "created_at": "2026-01-01T00:00:00Z",
}
VOLUME = {
    "name": "db",
    "id": "1",
    "serial": "s",
    "pool": "[red]fast",
    "size": 10 << 30,
    "block_size": 512,
    "state": "ready",
    "reason": None,
    "allocated": 3 << 20,
    "detail": "file",
    "attachment": ATTACHMENT,
    "created_at": "2026-01-01T00:00:00Z",
}
VOLUMES = [VOLUME, VOLUME | {"name": "empty", "attachment": None, "allocated": None, "newer": 1}]


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RINGSTONE_SOCKET", "RINGSTONE_MANAGER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[Canned]:
    with Canned(tmp_path / "gateway.sock") as server:
        server.reply = answer(200, json.dumps(VOLUMES).encode())
        yield server


class Asked(Exception):
    """What the real command would ask, and whom."""


def slow(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> ListFlags:
    class Client:
        def __init__(self, cli: CliContext) -> None:
            assert cli.manager is None
            self.socket = str(cli.socket)

        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *error: object) -> None:
            """Nothing is open."""

        def volumes(self, *, pool: str | None) -> Any:
            raise Asked(ListFlags(self.socket, pool))

    monkeypatch.setattr(CliContext, "client", lambda cli: Client(cli))
    with pytest.raises(Asked) as asked:
        app(list(arguments), prog_name="ringstone", standalone_mode=False)
    flags: ListFlags = asked.value.args[0]
    return flags


@pytest.mark.parametrize(
    "arguments",
    [
        ["volume", "list"],
        ["volume", "list", "--pool", "fast"],
        ["volume", "list", "--pool=fast"],
        ["volume", "list", "--pool="],
        ["--socket", "x.sock", "volume", "list"],
    ],
)
@pytest.mark.parametrize("environment", [None, "/e.sock", ""])
def test_both_ways_ask_the_same(
    arguments: list[str], environment: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("RINGSTONE_SOCKET", environment)
    quick = list_flags(arguments)
    assert quick is not None
    assert quick == slow(arguments, monkeypatch)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["volume"],
        ["volume", "lists"],
        ["volume", "list", "--help"],
        ["volume", "list", "--json"],
        ["--json", "volume", "list"],
        ["volume", "list", "stray"],
        ["volume", "list", "--pool"],
        ["volume", "list", "--pool", "--json"],
        ["volume", "list", "--pool", "a", "--pool", "b"],
        ["--socket", "volume", "list"],
        ["--socket", "--json", "volume", "list"],
        ["--manager", "https://a:1", "volume", "list"],
        ["pool", "list"],
    ],
)
def test_whatever_else_is_left_to_the_command(arguments: list[str]) -> None:
    assert list_flags(arguments) is None


def test_a_manager_is_left_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGSTONE_MANAGER", "https://a:1")
    assert list_flags(["volume", "list"]) is None
    # A socket on the command line counts more.
    assert list_flags(["--socket", "x.sock", "volume", "list"]) == ListFlags("x.sock")


def test_both_ways_print_the_same(canned: Canned, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_start.list_volumes(ListFlags(str(canned.path), "fast"))
    quick = capsys.readouterr()
    real = ["--socket", str(canned.path), "volume", "list", "--pool", "fast"]
    app(real, prog_name="ringstone", standalone_mode=False)
    assert quick == capsys.readouterr()
    assert [line.split()[0] for line in quick.out.splitlines()] == ["volume", "db", "empty"]
    assert [asked.split()[1] for asked in canned.asked] == [b"/v1/volumes?pool=fast"] * 2


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        json.dumps([{name: value for name, value in VOLUME.items() if name != "size"}]).encode(),
        json.dumps([VOLUME | {"size": "10G"}]).encode(),
        json.dumps([VOLUME | {"attachment": {"state": "running", "host": None}}]).encode(),
    ],
)
def test_an_answer_of_another_shape_is_told_by_the_command(
    canned: Canned, odd: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.reply = answer(200, odd)
    monkeypatch.setattr(sys, "argv", ["ringstone", "--socket", str(canned.path), "volume", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out, len(canned.asked)) == (1, "", 2)
    assert "answered GET /volumes with something else than this Ringstone expects" in said.err


def test_a_refusal_is_told_at_once(
    canned: Canned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.reply = answer(404, b'{"code": "not_found", "message": "There is no pool."}')
    monkeypatch.setattr(sys, "argv", ["ringstone", "--socket", str(canned.path), "volume", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, len(canned.asked)) == (3, 1)
    assert capsys.readouterr().err == "ringstone: There is no pool.\n"


def test_ctrl_c_ends_it_as_it_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(flags: ListFlags) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(list_start, "list_volumes", interrupted)
    monkeypatch.setattr(sys, "argv", ["ringstone", "volume", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_reader_that_has_gone_is_no_traceback(canned: Canned) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "ringstone", "--socket", str(canned.path), "volume", "list"],
            stdout=nobody,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_listing_volumes_imports_none_of_the_slow_libraries(canned: Canned) -> None:
    """Of the third of a second that it took, four fifths went into importing these."""
    code = (
        f"import sys; sys.argv = ['ringstone', '--socket', {str(canned.path)!r}, 'volume', 'list']\n"
        "from ringstone.cli import main\n"
        "main()\n"
        f"print(*sorted({{*{(*SLOW, *OURS)!r}}} & {{*sys.modules}}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "db" in done.stdout
    assert done.stderr.split() == []


def test_the_client_of_this_host_imports_no_library_of_the_network() -> None:
    code = (
        "import sys, ringstone.cli.volume, ringstone.client\n"
        "print(*sorted({'httpx2', 'httpcore2', 'h11', 'anyio', 'asyncio', 'rich', 'ringstone.stats'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
