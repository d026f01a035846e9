"""What the benchmarks ask other programs, read from them, and borrow from the machine."""

import json
import sys
from pathlib import Path

import pytest

from ringstone.bench import files, fio, hugepages, machine, qemu, single
from ringstone.bench.compare import Plan
from ringstone.bench.cpu import Meter
from ringstone.bench.process import LineProcess, cpu_seconds, job_answer, resident_bytes
from ringstone.bench.setting import Setting, prepared
from ringstone.bench.shape import Cores, Shape, Window
from ringstone.errors import ExistsError, InvalidError, NoDeviceError, RingstoneError, StorageError

PAGE = hugepages.PAGE_BYTES


def test_hugepages_are_given_back_also_after_an_error(tmp_path: Path) -> None:
    pool, free = tmp_path / "pool", tmp_path / "free"
    pool.write_text("7\n")
    free.write_text("2\n")
    seen = []

    def interrupted() -> None:
        with hugepages.reserved(10, pool=pool, free=free):
            seen.append(pool.read_text())
            pool.write_text("20")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == ["15"]
    # What somebody else added meanwhile stays.
    assert pool.read_text() == "12"


def test_free_hugepages_are_used_before_more_are_made(tmp_path: Path) -> None:
    pool, free = tmp_path / "pool", tmp_path / "free"
    pool.write_text("7\n")
    free.write_text("7\n")
    with hugepages.reserved(7, pool=pool, free=free) as had:
        assert (had, pool.read_text()) == (7, "7\n")


def test_each_memory_has_pages_of_its_own() -> None:
    assert hugepages.pages_for(1, PAGE, PAGE + 1) == 4
    assert hugepages.free_pages(Path("/nonexistent")) == 0


def test_fio_is_asked_for_what_the_gateway_does(tmp_path: Path) -> None:
    file = tmp_path / "volume"
    file.write_bytes(bytes(8192))
    line = fio.command(file, Shape(depth=8, queues=2, read_share=0), Window(0.5, 0.1))
    for option in (
        "--rw=randwrite",
        "--iodepth=16",
        "--direct=1",
        "--size=8192",
        "--runtime=500ms",
        "--ramp_time=100ms",
    ):
        assert option in line
    assert "--rw=rw" in fio.command(file, Shape(read_share=50, pattern="sequential"), Window())


def fio_output(reads: int, writes: int) -> str:
    def direction(total: int, iops: float, mean: float, p99: int) -> dict[str, object]:
        return {
            "total_ios": total,
            "iops": iops,
            "lat_ns": {"mean": mean},
            "clat_ns": {"percentile": {"99.000000": p99}} if total else {},
        }

    job = {"job options": {}, "read": direction(reads, 10, 100, 5), "write": direction(writes, 30, 300, 9)}
    return "note: something first\n" + json.dumps({"jobs": [job]})


def test_fios_directions_are_added_up() -> None:
    both = fio.parse(fio_output(100, 300))
    assert (both.iops, both.mean_ns, both.p99_ns) == (40, 250, 9)
    assert fio.parse(fio_output(100, 0)).iops == 10
    with pytest.raises(StorageError, match="no request"):
        fio.parse(fio_output(0, 0))


def test_qemu_is_tried_in_every_mode_the_file_allows() -> None:
    assert all(mode.direct for mode in qemu.modes(direct_only=True))
    assert {str(mode) for mode in qemu.modes(direct_only=False)} == {
        "aio=threads, cache.direct=on",
        "aio=native, cache.direct=on",
        "aio=io_uring, cache.direct=on",
        "aio=threads, cache.direct=off",
        "aio=io_uring, cache.direct=off",
    }


def test_qemus_monitor_comes_after_its_export() -> None:
    line = qemu.command(Path("/a,b"), Path("/tmp/s"), qemu.AioMode("native", True), queues=3)
    assert line.index("--monitor") > line.index("--export") > line.index("--blockdev")
    blockdev, export = (json.loads(line[line.index(flag) + 1]) for flag in ("--blockdev", "--export"))
    assert (blockdev["filename"], blockdev["aio"], blockdev["cache"]) == ("/a,b", "native", {"direct": True})
    assert (export["addr"]["path"], export["num-queues"]) == ("/tmp/s", 3)


def test_a_filled_file_holds_data_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "volume"
    with files.filled(path, (4 << 20) + 4096) as file:
        assert file.stat().st_size == (4 << 20) + 4096
        assert b"\0" * 4096 not in file.read_bytes()
        with pytest.raises(ExistsError, match="exists"), files.filled(path, 4096):
            pass
        assert path.exists()
    assert not path.exists()


def test_a_child_that_ends_gives_its_last_words(tmp_path: Path) -> None:
    script = (
        "import sys; print('{\"hello\": 1}', flush=True); sys.stdin.readline(); sys.exit('no such thing')"
    )
    with LineProcess([sys.executable, "-c", script], log=tmp_path / "log") as child:
        assert child.receive() == {"hello": 1}
        child.send({"do": "it"})
        with pytest.raises(RingstoneError, match=r"status 1: no such thing"):
            child.receive()


def test_what_a_child_costs_can_be_read(tmp_path: Path) -> None:
    script = "kept = b'x' * (32 << 20); print('{}', flush=True); input()"
    with LineProcess([sys.executable, "-c", script], log=tmp_path / "log") as child:
        child.receive()
        assert resident_bytes(child.pid) > 32 << 20
        assert cpu_seconds(child.pid) > 0
        child.send({})


def test_cpu_time_is_read_off_the_middle_of_a_load(tmp_path: Path) -> None:
    """A child that is busy from the first answer to the second."""
    script = (
        "import time; input(); began = time.monotonic()\n"
        "while time.monotonic() - began < 0.4: pass\n"
        "print('{}', flush=True)"
    )
    with LineProcess([sys.executable, "-c", script], log=tmp_path / "log") as child:
        with Meter(child.pid) as meter:
            child.send({})
            child.receive()
        busy, reactors = meter.cores(0.4)
    # Others may have the core for a while.
    assert 0.1 < busy < 1.1
    assert reactors == 0


def test_a_load_too_short_for_its_cpu_time_says_so(tmp_path: Path) -> None:
    with LineProcess([sys.executable, "-c", "input()"], log=tmp_path / "log") as child:
        with Meter(child.pid) as meter:
            pass
        with pytest.raises(RingstoneError, match="Measure for longer"):
            meter.cores(0.001)
        child.send({})


def test_a_generators_error_keeps_its_code() -> None:
    with pytest.raises(StorageError, match="lost"):
        job_answer('{"code": "io", "error": "The backend was lost."}', "", 0)
    with pytest.raises(RingstoneError, match=r"status 1: ValueError: bad"):
        job_answer("", "Traceback\nValueError: bad\n", 1)
    assert job_answer('{"report": {"iops": 1}}', "", 0) == {"iops": 1}


def test_the_machine_is_described() -> None:
    described = machine.describe()
    assert described.cores >= 1
    assert described.memory_bytes > 0
    assert described.versions["python"].startswith("3.")
    assert machine.filesystem_of(Path("/dev/shm")) == "tmpfs"


def setting(directory: Path) -> Setting:
    return Setting(directory, directory, Cores(), Plan(), lambda text: None, size=8192)


@pytest.mark.parametrize(
    ("subject", "shape", "words"),
    [
        (single.Subject(socket=Path("/s"), against="fio"), Shape(), "does not go with --socket"),
        (single.Subject(volume="memory", against="fio"), Shape(), "add --volume-type file"),
        (single.Subject(volume="file", file=Path("/etc/hostname")), Shape(read_share=50), "--overwrite"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, subject: single.Subject, shape: Shape, words: str
) -> None:
    with pytest.raises(InvalidError, match=words):
        single.gateway(subject, shape, setting(tmp_path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(NoDeviceError, match="is empty"):
        single.gateway(single.Subject(volume="file", file=empty), Shape(), setting(tmp_path))


@pytest.mark.parametrize(
    ("cores", "words"), [(Cores(0, 0), "core of its own"), (Cores(0, 9999), "Core 9999")]
)
def test_cores_are_checked_before_anything_is_made(cores: Cores, words: str) -> None:
    with (
        pytest.raises(InvalidError, match=words),
        prepared(cores=cores, plan=Plan(), progress=lambda text: None),
    ):
        pass
