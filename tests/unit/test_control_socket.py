"""The control API's socket: whose it is when a gateway starts."""

import contextlib
import socket
from pathlib import Path

import pytest

from ringstone.errors import ExistsError
from ringstone.gateway.server import listen


def test_a_socket_whose_owner_does_not_accept_is_not_waited_for(tmp_path: Path) -> None:
    """A start hung there: its own look waited for a place in the other's backlog."""
    path = tmp_path / "api.sock"
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        owner.bind(str(path))
        owner.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting.setblocking(False)
                waiting.connect(str(path))
        with pytest.raises(ExistsError, match="Another process listens"):
            listen(path)
        assert path.is_socket()


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as owner:
        owner.bind(str(path))
    listen(path).close()
