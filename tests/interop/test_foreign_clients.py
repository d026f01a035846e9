"""Other people's clients of a volume's socket, without a guest: QEMU's tools over libblkio."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.framework.gateway import GatewayProcess
from tests.framework.guest import backing_of
from tests.framework.qemus import CACHE, program

MIB = 1 << 20
SIZE = 32 * MIB
# scripts/qemus unpacks the tools with this version, and libblkio 1.5.
QEMU, SUITE = "10.0", "trixie"


def tool(*command: str) -> str:
    """Output of one of that suite's programs."""
    program(QEMU)
    in_root = str(CACHE.parent / "scripts/in-root")
    done = subprocess.run([in_root, SUITE, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_qemus_tools_fill_check_and_read_back_a_volume(tmp_path: Path, kind: str) -> None:
    content = random.Random(5).randbytes(SIZE)
    image, back = tmp_path / "image.raw", tmp_path / "back.raw"
    image.write_bytes(content)
    with GatewayProcess() as gateway:
        attachment = gateway.start().serve("v", kind=kind, size=SIZE, queues=2)
        disk = f"driver=virtio-blk-vhost-user,path={attachment.socket},cache.direct=on"
        assert f"virtual size: {SIZE // MIB} MiB" in tool("qemu-img", "info", "--image-opts", disk)
        # Each is a connection of its own.
        tool("qemu-img", "convert", "-n", "-f", "raw", "--target-image-opts", str(image), disk)
        tool("qemu-img", "convert", "-O", "raw", "--image-opts", disk, str(back))
        assert back.read_bytes() == content
        said = tool(
            *("qemu-io", "--image-opts", disk),
            *("-c", "write -P 0x5a 4k 64k", "-c", "flush", "-c", "read -P 0x5a 4k 64k"),
            *("-c", "write -z 1M 1M", "-c", "discard 4M 1M", "-c", "read -P 0 1M 1M"),
        )
        assert "Pattern verification failed" not in said
        with gateway.client() as client:
            assert sum(queue.errors for queue in client.stats(volume="v").of_volume("v")) == 0
            assert client.attachment("v").state != "needs_reset"
        held = backing_of(gateway, "v").read_bytes()
        assert held[4096 : 4096 + (64 << 10)] == b"\x5a" * (64 << 10)
        assert held[MIB : 2 * MIB] == bytes(MIB)
        assert held[8 * MIB :] == content[8 * MIB :]
