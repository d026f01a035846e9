"""What a client of this host's gateway says of whatever listens on its socket."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringstone import models
from ringstone.client import GatewayClient
from ringstone.errors import NotFoundError, RingstoneError, StoppedError, UnreachableError
from tests.framework.canned import Canned, answer

REFUSED = json.dumps({"code": "not_found", "message": "There is no pool 'p'.", "more": 1}).encode()


@pytest.fixture
def canned(tmp_path: Path) -> Iterator[Canned]:
    with Canned(tmp_path / "gateway.sock") as server:
        yield server


def test_a_request_is_what_the_api_reads(canned: Canned) -> None:
    canned.reply = answer(204, b"")
    with GatewayClient(canned.path) as client:
        client.detach("a/b c", force=True)
        client.delete_pool("..")
        client.move_queue("v", 1, 2)
    first, second, third = canned.asked
    assert first.startswith(b"DELETE /v1/attachments/a%2Fb%20c?force=true HTTP/1.1\r\n")
    assert second.startswith(b"DELETE /v1/pools/%2E%2E HTTP/1.1\r\n")
    assert b"\r\nContent-Type: application/json\r\n" in third
    assert json.loads(third.partition(b"\r\n\r\n")[2]) == {"core": 2}


def test_a_refusal_is_the_error_that_its_code_names(canned: Canned) -> None:
    canned.reply = answer(404, REFUSED)
    with GatewayClient(canned.path) as client, pytest.raises(NotFoundError) as told:
        client.pool("p")
    assert told.value.message == "There is no pool 'p'."


def test_a_process_that_was_replaced_is_not_the_last_word(canned: Canned) -> None:
    """It answers for a moment more, at the socket that is its successor's too."""
    stopped = answer(503, json.dumps({"code": "stopped", "message": "the engine was stopped"}).encode())
    canned.first = [stopped, stopped]
    with GatewayClient(canned.path) as client:
        assert client.volumes() == []
        canned.first = [stopped]
        with pytest.raises(StoppedError):
            client.delete_pool("p")
    assert len(canned.asked) == 4


def test_the_body_of_an_error_is_that_of_the_api() -> None:
    """peer.py reads it without pydantic."""
    assert models.ErrorBody.model_validate_json(REFUSED).code == "not_found"
    assert set(models.ErrorBody.model_fields) == {"code", "message"}


@pytest.mark.parametrize(
    "content", [b"<html>", b"", b"[]", b'{"code": "busy"}', b'{"code": 1, "message": "m"}', b"[" * 100_000]
)
def test_an_error_that_is_none_of_ours_comes_from_a_stranger(canned: Canned, content: bytes) -> None:
    canned.reply = answer(404, content)
    with (
        GatewayClient(canned.path) as client,
        pytest.raises(RingstoneError, match="answered 404 and is no Ringstone gateway"),
    ):
        client.volumes()


def test_an_answer_of_another_shape_is_told(canned: Canned) -> None:
    canned.reply = answer(200, b'[{"name": "v"}]')
    with (
        GatewayClient(canned.path) as client,
        pytest.raises(RingstoneError, match=r"^The gateway at .* answered GET /volumes with something else"),
    ):
        client.volumes()


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b"", "Server disconnected without sending a response."),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[", "IncompleteRead"),
    ],
    ids=["nothing", "no http", "cut short"],
)
def test_what_is_no_answer_may_have_been_done(canned: Canned, reply: bytes, why: str) -> None:
    canned.reply = reply
    with GatewayClient(canned.path) as client, pytest.raises(UnreachableError) as told:
        client.volumes()
    assert told.value.message.startswith(f"The gateway at {canned.path} does not answer ({why}")
    assert told.value.sent


def test_an_answer_that_does_not_come_in_time_is_told_so(canned: Canned) -> None:
    canned.held = threading.Event()
    with GatewayClient(canned.path, timeout=0.05) as client:
        with pytest.raises(UnreachableError, match=r"did not answer within 0\.05 seconds") as told:
            client.volumes()
        canned.held.set()
    assert told.value.sent


def test_who_is_not_there_was_sent_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    with GatewayClient(path) as client:
        with pytest.raises(UnreachableError, match="there is no such socket") as told:
            client.volumes()
        assert not told.value.sent
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(str(path))
        with pytest.raises(UnreachableError, match=r"\(\[Errno 111\] Connection refused\)") as told:
            client.volumes()
        assert not told.value.sent


def test_a_gateway_that_comes_back_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    with GatewayClient(path) as client:
        for _ in range(2):
            with Canned(path) as server:
                server.reply = answer(200, b"[]")
                assert client.volumes() == client.volumes() == []
            path.unlink()
