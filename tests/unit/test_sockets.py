"""Sockets of the gateway's own."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from socket import socket

import pytest

from ringstone.gateway import handover, server


@pytest.mark.parametrize("listen", [server.listen, handover._listen])
def test_a_socket_is_private_from_its_first_moment(
    listen: Callable[[Path], socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was made for whom the umask lets in, and for its owner alone only a moment later."""
    path = tmp_path / "sock"
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))

    # What comes between binding and listening.
    monkeypatch.setattr(os, "chmod", look)
    before = os.umask(0)
    try:
        with listen(path):
            look()
    finally:
        os.umask(before)
    assert set(seen) == {0o600}
