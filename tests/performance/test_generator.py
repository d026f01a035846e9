"""The load generator's other modes against a real engine: what they find, and what they say when it is
gone."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringstone.bench.gateway import EngineProcess
from ringstone.bench.process import module_command, run_job
from ringstone.bench.rest import connected
from ringstone.errors import RingstoneError

SIZE = 16 << 20


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path, [max(os.sched_getaffinity(0))]) as engine:
        yield engine


def serve(engine: EngineProcess, name: str, queues: int = 1, **backend: object) -> str:
    return str(engine.serve(name, json.dumps(backend), size=SIZE, queues=queues))


def verify(socket: str, **more: object) -> dict[str, Any]:
    report: dict[str, Any] = run_job("load", {"mode": "verify", "socket": socket, "operations": 400, **more})
    return report


def test_verification_passes_on_a_volume_that_keeps_what_it_is_given(engine: EngineProcess) -> None:
    report = verify(serve(engine, "good", queues=2, type="memory"), queues=2, starts_zeroed=True)
    assert (report["passed"], report["findings"]) == (True, [])
    assert report["blocks_checked"] >= SIZE // 512
    assert all(count > 0 for count in report["operations"].values())


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("lost_per_million", "must hold write"),
        ("torn_per_million", "must hold write"),
        ("error_per_million", "errno 5"),
    ],
)
def test_verification_finds_what_a_faulty_volume_does(
    engine: EngineProcess, fault: str, finding: str
) -> None:
    faults: dict[str, Any] = {fault: 50_000}
    report = verify(serve(engine, "bad", type="faulty", inner={"type": "memory"}, seed=1, **faults))
    assert not report["passed"]
    assert finding in report["findings"][0]


def test_a_script_answers_for_each_request(engine: EngineProcess) -> None:
    operations = [
        {"op": "get_id"},
        {"op": "write", "offset": 4096, "segments": [512, 1024, 2560], "fill": {"seed": 9}},
        {"op": "read", "offset": 4096, "len": 4096},
        {"op": "write_zeroes", "offset": 4096, "len": 512},
        {"op": "read", "offset": 4096, "len": 512},
        {"op": "read", "offset": SIZE, "len": 512},
        {"op": "raw", "type": 4242, "writable": [4]},
    ]
    socket = serve(engine, "scripted", type="memory")
    report = run_job("load", {"mode": "script", "socket": socket, "operations": operations})
    identified, wrote, read, zeroed, zeros, outside, unknown = report["results"]
    assert identified["text"] == "scripted"
    assert wrote["crc32"] == read["crc32"]
    assert not read["zero"]
    assert (zeroed["status"], zeros["zero"]) == ("ok", True)
    assert (outside["status"], unknown["status"]) == ("ioerr", "unsupp")
    assert report["device"]["capacity_bytes"] == SIZE


@pytest.mark.parametrize(
    ("packed", "inflight", "dirty_log"),
    [
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (True, True, False),
        (False, None, True),
    ],
)
def test_a_load_can_choose_what_its_rings_are(
    engine: EngineProcess, packed: bool, inflight: bool | None, dirty_log: bool
) -> None:
    choices = {"packed": packed, "inflight": inflight, "dirty_log": dirty_log}
    job = {"mode": "load", "seconds": 0.1, "warmup_seconds": 0, "queues": 2, "depth": 4, "read_share": 50}
    report = run_job("load", {**job, "socket": serve(engine, "chosen", queues=2, type="memory"), **choices})
    # A ring on which nothing comes back would have ended the job.
    assert report["errors"] == 0
    assert bool(report["device"]["features"] & 1 << 34) is packed


def test_idle_connections_are_held_until_they_are_let_go(engine: EngineProcess) -> None:
    sockets = [Path(serve(engine, name, type="null")) for name in ("one", "two")]
    with connected(sockets) as held:
        assert {attachment["state"] for attachment in engine.call("attachments")} == {"running"}
    assert held.report is not None
    assert len(held.report.connect_ns) == 2


def test_a_connection_that_cannot_be_held_says_why(engine: EngineProcess, tmp_path: Path) -> None:
    with pytest.raises(RingstoneError, match="cannot connect"), connected([tmp_path / "nobody"]):
        pass


def test_a_backend_that_stops_answering_ends_the_load(engine: EngineProcess) -> None:
    socket = serve(engine, "slow", type="faulty", inner={"type": "memory"}, seed=1, delay_us=2_000_000)
    with pytest.raises(RingstoneError, match=r"completed nothing for .* with 2 request"):
        run_job("load", {"mode": "load", "socket": socket, "depth": 2, "stall_seconds": 0.2})


def test_nobody_at_the_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(RingstoneError, match="check that the backend listens"):
        run_job("load", {"mode": "load", "socket": str(tmp_path / "nobody")})


def test_the_client_is_a_program_of_its_own() -> None:
    done = subprocess.run(
        module_command("client"),
        input='{"call": "limit", "config": {}}',
        capture_output=True,
        text=True,
        check=True,
    )
    assert "server_core" in json.loads(done.stdout)["error"]
