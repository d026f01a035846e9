"""`ringstone bench rbd` runs, for so short a time that the figures mean nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringstone.cli.app import app
from ringstone.lab.ceph import CephCluster
from tests.performance.test_smoke import leftovers

CORES = sorted(os.sched_getaffinity(0))[:2]
MISSING = [
    program for program in ("ceph-osd", "rbd", "fio", "qemu-storage-daemon") if not shutil.which(program)
]

pytestmark = [
    pytest.mark.skipif(len(CORES) < 2, reason="the gateway and all the others need a core each"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


def test_an_image_beside_fio_and_qemu(ceph: CephCluster, tmp_path: Path) -> None:
    before = leftovers()
    where = ("--conf", str(ceph.conf_path), "--user", "ringstone", "--output", str(tmp_path))
    quick = ("--size", "16M", "--seconds", "0.5", "--warmup", "0.1", "--rounds", "1")
    depths = ("--depth", "1", "--depth", "8")
    cores = ("--server-core", str(CORES[0]), "--client-core", str(CORES[1]))
    done = CliRunner().invoke(
        app, ["--json", "bench", "rbd", *where, *quick, *depths, *cores], catch_exceptions=False
    )
    assert done.exit_code == 0
    (raw,) = tmp_path.glob("*-rbd.json")
    written = json.loads(raw.read_text())
    assert written == json.loads(done.stdout)
    contenders = [one["contender"] for one in written["raw"]]
    assert contenders == ["fio rbd", "qemu-storage-daemon", "ringstone"] * 4
    assert all(one["rounds"][0]["cpu"]["server_ns"] > 0 for one in written["raw"])
    judged = [row["reference"] for row in written["rows"] if row["passed"] is not None]
    assert judged == ["fio rbd"] * 4
    assert "`ringstone bench rbd`" in (tmp_path / "README.md").read_text()
    # The image is gone.
    assert ceph.rbd("ls", "rbd") == ""
    assert leftovers() == before
