"""fio's arguments and JSON, against the real fio on a file of this host."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio

BLOCKS = 64


@pytest.fixture
def job(tmp_path: Path) -> FioJob:
    return FioJob(
        "job", "randwrite", size=BLOCKS * 4096, filename=str(tmp_path / "disk"), direct=False, verify="write"
    )


def _run(job: FioJob) -> subprocess.CompletedProcess[str]:
    folder = Path(job.filename).parent
    return subprocess.run(fio_command(job), shell=True, cwd=folder, capture_output=True, text=True)


def test_a_verified_write_counts_every_block_twice(job: FioJob) -> None:
    done = _run(job)
    assert done.returncode == 0, done.stderr
    result = parse_fio(done.stdout)
    assert (result.write.operations, result.read.operations, result.errors) == (BLOCKS, BLOCKS, 0)
    assert sum(count for _, count in result.write.histogram) == BLOCKS
    assert 0 < result.write.percentile_ns(50) <= result.write.percentile_ns(99.9)
    assert result.write.iops > 0


def test_verify_only_reads_and_does_not_write(job: FioJob) -> None:
    _run(job)
    before = Path(job.filename).read_bytes()
    result = parse_fio(_run(replace(job, verify="only")).stdout)
    assert result.read.operations == BLOCKS
    assert Path(job.filename).read_bytes() == before


@pytest.mark.parametrize("damage", ["zeroed", "swapped", "one bit"])
def test_verify_only_fails_on_a_damaged_block(job: FioJob, damage: str) -> None:
    _run(job)
    disk = bytearray(Path(job.filename).read_bytes())
    if damage == "zeroed":
        disk[8192:12288] = bytes(4096)
    elif damage == "swapped":
        disk[8192:12288], disk[20480:24576] = disk[20480:24576], disk[8192:12288]
    else:
        disk[10000] ^= 1
    Path(job.filename).write_bytes(disk)
    assert _run(replace(job, verify="only")).returncode != 0


def test_lines_before_the_json_are_skipped_and_none_is_an_error(job: FioJob) -> None:
    assert parse_fio("fio: a note\n" + _run(job).stdout).errors == 0
    with pytest.raises(ValueError, match="cannot start"):
        parse_fio("fio: cannot start")
