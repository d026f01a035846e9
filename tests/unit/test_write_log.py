"""The log that dm-log-writes keeps, as a reader of ours takes it."""

import struct
from pathlib import Path

import pytest

from tests.framework.write_log import MAGIC, Flag, WriteLog

SECTOR = 512


def entry(sector: int, count: int, flags: int, text: bytes = b"", data: bytes = b"") -> bytes:
    return (struct.pack("<4Q", sector, count, flags, len(text)) + text).ljust(SECTOR, b"\0") + data


@pytest.fixture
def log(tmp_path: Path) -> WriteLog:
    """Two writes and the flush that made them durable, a mark, a discard, and one with FUA."""
    entries = [
        entry(0, 2, 0, data=b"a" * 2 * SECTOR),
        entry(1, 2, Flag.METADATA, data=b"b" * 2 * SECTOR),
        entry(0, 0, Flag.FLUSH),
        entry(0, 0, Flag.MARK, b"begin"),
        entry(0, 1, Flag.DISCARD),
        entry(2, 1, Flag.FUA, data=b"c" * SECTOR),
    ]
    head = struct.pack("<QQQI", MAGIC, 1, len(entries), SECTOR).ljust(SECTOR, b"\0")
    path = tmp_path / "log"
    path.write_bytes(head + b"".join(entries) + entry(0, 0, 0))
    return WriteLog(path)


def replayed(tmp_path: Path, log: WriteLog, places: list[int], sectors: int | None = None) -> bytes:
    drive = tmp_path / "drive"
    drive.write_bytes(b"." * 4 * SECTOR)
    log.replay(drive, places, sectors=sectors)
    return drive.read_bytes()[::SECTOR]


def test_entries_are_what_the_kernel_wrote(log: WriteLog) -> None:
    assert [(one.offset, one.length, one.mark) for one in log.entries] == [
        (0, 1024, None),
        (512, 1024, None),
        (0, 0, None),
        (0, 0, "begin"),
        (0, 512, None),
        (1024, 512, None),
    ]
    assert list(log.groups()) == [range(0, 2), range(4, 5)]


def test_any_of_them_are_done_once_more(tmp_path: Path, log: WriteLog) -> None:
    assert replayed(tmp_path, log, [0, 1, 2, 3]) == b"abb."
    assert replayed(tmp_path, log, [1]) == b".bb."
    assert replayed(tmp_path, log, list(range(6))) == b"\0bc."
    assert replayed(tmp_path, log, [1], sectors=1) == b".b.."


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(SECTOR))
    with pytest.raises(ValueError, match="is no log of writes"):
        WriteLog(path)
