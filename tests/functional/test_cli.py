"""The command line against a real gateway: what a person types, sees, and gets as exit code."""

import io
import json
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from ringstone.cli import main
from ringstone.cli.app import app
from tests.framework.gateway import RINGSTONE, GatewayProcess

MIB = 1 << 20


def run_here(gateway: GatewayProcess, *arguments: str) -> tuple[int, str, str]:
    """A command's exit code, standard output and error, run in this process: a table of them takes
    seconds."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["ringstone", "--socket", str(gateway.socket), *arguments]
    with (
        patch.object(sys, "argv", argv),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


def one_sentence(gateway: GatewayProcess, expected: int, *arguments: str) -> str:
    """The message of a command that must end with `expected`: one line on standard error, and none on
    standard output."""
    code, out, err = run_here(gateway, *arguments)
    assert (code, out) == (expected, ""), err
    (line,) = err.splitlines()
    assert line.startswith("ringstone: ")
    assert line.endswith("."), line
    code, out, err = run_here(gateway, *arguments, "--json")
    assert (code, out) == (expected, "")
    error = json.loads(err)
    assert sorted(error) == ["code", "message"]
    assert f"ringstone: {error['message']}" == line
    return line


def test_the_life_of_a_volume(gateway: GatewayProcess) -> None:
    disk = gateway.root / "disk"
    disk.mkdir()
    gateway.cli("pool", "create", "main", "--type", "file", "--path", str(disk), "--capacity", "1G")
    gateway.cli("volume", "create", "web", "--pool", "main", "--size", "64M", "--block-size", "4096")
    assert "web" in gateway.cli("volume", "list").stdout
    assert "64 MiB" in gateway.cli("volume", "show", "web").stdout

    assert str(gateway.run_dir) in gateway.cli("volume", "attach", "web").stdout
    attachment = gateway.cli_json("volume", "show", "web")["attachment"]
    assert (attachment["state"], attachment["queues"]) == ("listening", 1)
    assert Path(attachment["socket"]).is_socket()

    gateway.cli("volume", "resize", "web", "128M")
    assert (disk / "web.raw").stat().st_size == 128 * MIB
    shown = gateway.cli_json("volume", "show", "web")
    assert (shown["size"], shown["block_size"], shown["state"]) == (128 * MIB, 4096, "ready")
    pool = gateway.cli_json("pool", "show", "main")
    assert (pool["volumes"], pool["provisioned"], pool["capacity"]) == (1, 128 * MIB, 1 << 30)

    gateway.cli("volume", "detach", "web")
    assert not Path(attachment["socket"]).exists()
    gateway.cli("volume", "delete", "web")
    gateway.cli("pool", "delete", "main")
    assert gateway.cli_json("volume", "list") == gateway.cli_json("pool", "list") == []
    assert list(disk.iterdir()) == []


def test_bad_input_is_one_sentence_and_an_exit_code(gateway: GatewayProcess) -> None:
    disk = gateway.root / "disk"
    disk.mkdir()
    gateway.cli("pool", "create", "main", "--type", "file", "--path", str(disk), "--capacity", "256M")
    gateway.cli("volume", "create", "web", "--pool", "main", "--size", "64M")
    gateway.cli("volume", "attach", "web")
    before = gateway.cli_json("volume", "list"), gateway.cli_json("pool", "list"), sorted(disk.iterdir())

    create = ("volume", "create", "new", "--pool", "main", "--size")
    cases: list[tuple[int, tuple[str, ...], str]] = [
        (4, ("volume", "create", "web", "--pool", "main", "--size", "1M"), "choose another name"),
        (4, ("pool", "create", "main", "--type", "null"), "choose another name"),
        (4, ("pool", "create", "again", "--type", "file", "--path", str(disk)), "choose another path"),
        (6, (*create, "193M"), "has 192 MiB left of 256 MiB"),
        (5, (*create, "1000"), "use 512 or 1024 bytes"),
        (5, (*create, "4608", "--block-size", "4096"), "use 4096 or 8192 bytes"),
        (5, (*create, "1M", "--block-size", "1024"), "use 512 or 4096"),
        (5, ("volume", "create", "new", "--pool", "main"), "for example 10G"),
        (5, ("volume", "create", "no/slash", "--pool", "main", "--size", "1M"), "is not a volume name"),
        (5, ("pool", "create", ".hidden", "--type", "null"), "is not a pool name"),
        (3, ("volume", "create", "new", "--pool", "side", "--size", "1M"), "ringstone pool list"),
        (8, ("pool", "create", "new", "--type", "file", "--path", "/dev/ringstone-missing"), "lsblk"),
        (8, ("pool", "create", "new", "--type", "file", "--path", str(disk / "missing")), "mount"),
        (5, ("volume", "resize", "web", "32M"), "cannot shrink"),
        (5, ("volume", "resize", "web", "64M"), "already has 64 MiB"),
        (6, ("volume", "resize", "web", "512M"), "192 MiB left"),
        (4, ("volume", "delete", "web"), "volume detach web"),
        (4, ("volume", "attach", "web"), "already attached"),
        (4, ("pool", "delete", "main"), "delete them first"),
        (3, ("volume", "show", "new"), "ringstone volume list"),
        (3, ("volume", "attach", "new"), "ringstone volume list"),
        (3, ("volume", "detach", "new"), "ringstone volume list"),
        (3, ("volume", "resize", "new", "1G"), "ringstone volume list"),
        (3, ("volume", "delete", "new"), "ringstone volume list"),
        (3, ("volume", "stats", "new"), "ringstone volume list"),
        (3, ("qemu-args", "new"), "ringstone volume list"),
        (3, ("pool", "show", "new"), "ringstone pool list"),
        (3, ("pool", "delete", "new"), "ringstone pool list"),
    ]
    for code, arguments, next_step in cases:
        assert next_step in one_sentence(gateway, code, *arguments), arguments

    after = gateway.cli_json("volume", "list"), gateway.cli_json("pool", "list"), sorted(disk.iterdir())
    for pool in before[1] + after[1]:
        del pool["free"]
    assert after == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("volume", "create", "v", "--pool", "p", "--size", "10GB"),
        ("volume", "create", "v"),
        ("volume", "attach", "v", "--queues", "0"),
        ("volume", "attach", "v", "--queues", "65"),
        ("pool", "create", "p", "--type", "tape"),
        ("volume", "explode", "v"),
        ("top", "--interval", "0"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([*RINGSTONE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_without_a_gateway_the_next_step_is_to_start_one(tmp_path: Path) -> None:
    for arguments in (("volume", "list"), ("top", "--count", "1"), ("status",)):
        done = subprocess.run(
            [*RINGSTONE, "--socket", str(tmp_path / "none.sock"), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 7
        (line,) = done.stderr.splitlines()
        assert "ringstone gateway" in line


def test_a_stopped_gateway_is_unreachable_too(gateway: GatewayProcess) -> None:
    gateway.kill()
    assert gateway.socket.exists()
    done = gateway.cli("volume", "list", check=False)
    assert (done.returncode, done.stdout) == (7, "")
    assert "does not answer" in done.stderr


def test_the_socket_may_come_from_the_environment(gateway: GatewayProcess) -> None:
    done = subprocess.run(
        [*RINGSTONE, "status", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=gateway.environment(RINGSTONE_SOCKET=str(gateway.socket)),
    )
    assert json.loads(done.stdout)["gateway"]["pid"] == gateway.pid


def test_status_tells_health_and_events(gateway: GatewayProcess) -> None:
    status = gateway.cli_json("status", "--events", "10")
    assert status["health"] == {"status": "ok", "reasons": []}
    assert status["gateway"]["cores"] == gateway.cores
    gateway.serve("v", kind="file")
    (gateway.state_dir / "pools/file/v.raw").unlink()
    status = gateway.cli_json("status")
    assert status["health"]["status"] == "degraded"
    assert "v.raw" in gateway.cli("status").stdout


def test_stats_and_top_show_a_resting_volume(gateway: GatewayProcess) -> None:
    gateway.serve("v", queues=2)
    totals = gateway.cli_json("volume", "stats", "v")
    assert (totals["queues"], totals["reads"], totals["read_latency"]["p99_ns"]) == (2, 0, None)
    assert "p99.9" in gateway.cli("volume", "stats", "v").stdout

    watch = ("--interval", "0.1", "--count", "2")
    lines = gateway.cli("volume", "stats", "v", "--watch", *watch, "--json").stdout.splitlines()
    assert [(json.loads(line)["volume"], json.loads(line)["iops"]) for line in lines] == [("v", 0.0)] * 2
    lines = gateway.cli("top", *watch, "--json").stdout.splitlines()
    assert [[volume["volume"] for volume in json.loads(line)["volumes"]] for line in lines] == [["v"]] * 2
    assert [len(json.loads(line)["reactors"]) for line in lines] == [len(gateway.cores)] * 2
    table = gateway.cli("top", *watch).stdout
    assert "busy" in table
    assert "p99.9" in table


@pytest.mark.parametrize("command", [("top",), ("volume", "stats", "v", "--watch")])
def test_ctrl_c_ends_a_live_command_without_an_error(
    gateway: GatewayProcess, command: tuple[str, ...]
) -> None:
    gateway.serve("v")
    with subprocess.Popen(
        [*RINGSTONE, "--socket", str(gateway.socket), *command, "--interval", "0.1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=gateway.environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_what_starts_a_guest_is_printed(gateway: GatewayProcess) -> None:
    attachment = gateway.serve("v", queues=4)
    line = gateway.cli("qemu-args", "v", "--memory", "2G").stdout
    as_json = gateway.cli_json("qemu-args", "v", "--memory", "2G")["args"]
    assert shlex.split(line) == as_json
    assert (
        json.loads(gateway.cli("qemu-args", "v", "--memory", "2G", "--format", "json").stdout)["args"]
        == as_json
    )
    assert any(attachment.socket in argument for argument in as_json)
    assert any("num-queues=4" in argument for argument in as_json)
    assert any("2048M" in argument for argument in as_json)
    assert any("packed=on" in argument for argument in as_json)
    assert "packed" not in gateway.cli("qemu-args", "v", "--no-packed").stdout
    xml = gateway.cli("libvirt-xml", "v", "--hugepages").stdout
    assert attachment.socket in xml
    assert 'packed="on"' in xml
    assert "packed" not in gateway.cli("libvirt-xml", "v", "--no-packed").stdout
    gateway.cli("volume", "detach", "v")
    assert "volume attach v" in one_sentence(gateway, 3, "qemu-args", "v")


def test_names_are_completed_from_the_gateway(gateway: GatewayProcess) -> None:
    gateway.serve("web-1")
    gateway.serve("web-2")
    gateway.serve("db")

    def complete(words: str) -> list[str]:
        done = subprocess.run(
            RINGSTONE,
            capture_output=True,
            text=True,
            check=False,
            env=gateway.environment(
                RINGSTONE_SOCKET=str(gateway.socket),
                _RINGSTONE_COMPLETE="complete_bash",
                COMP_WORDS=words,
                COMP_CWORD=str(len(words.split(" ")) - 1),
            ),
        )
        return done.stdout.split()

    assert complete("ringstone volume show we") == ["web-1", "web-2"]
    assert complete("ringstone volume create x --pool ") == ["memory"]
    assert complete("ringstone pool show mem") == ["memory"]
    gateway.stop()
    assert complete("ringstone volume show we") == []


def test_every_command_has_help_and_json() -> None:
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    for command in (
        *("pool create", "pool list", "pool show", "pool delete"),
        *("volume create", "volume list", "volume show", "volume resize", "volume delete"),
        *("volume attach", "volume detach", "volume stats"),
        *("top", "status", "qemu-args", "libvirt-xml"),
    ):
        shown = runner.invoke(app, [*command.split(), "--help"])
        assert shown.exit_code == 0, command
        assert "--json" in shown.stdout, command


def test_an_error_reaches_the_shell(gateway: GatewayProcess) -> None:
    done = gateway.cli("volume", "show", "none", check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("ringstone: There is no volume 'none'")


def test_a_migration_needs_qemus_that_answer(gateway: GatewayProcess) -> None:
    gateway.serve("v")
    missing = str(gateway.root / "missing.sock")
    done = gateway.cli(
        *("vm", "migrate", "--source-qmp", missing, "--destination-qmp", missing),
        *("--uri", "unix:/move.sock", "--volume", "v"),
        check=False,
    )
    assert done.returncode == 7
    assert f"start the source with -qmp unix:{missing},server=on,wait=off" in done.stderr
    assert gateway.cli_json("volume", "show", "v")["attachment"]["shared"] is False
