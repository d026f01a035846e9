"""A guest whose balloon gives memory back to the host while its disk is busy.

Once the gateway registered guest memory with io_uring, which pins the pages of that moment. What the balloon gave
back and the guest used again was another page then: writes answered OK stored old bytes, and reads answered OK brought
nothing.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringstone.hypervisor.fio import FioJob, fio_command
from ringstone.hypervisor.guest import Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.gateway import gateway as gateway
from tests.framework.guest import GuestHost, wait_until

MIB = 1 << 20
ROUNDS = 4
JOB = FioJob("ballooned", "randwrite", engine="io_uring", depth=16, size=8 * MIB, verify="write")


def allocate_memory(guest: Guest) -> None:
    """Give all of the guest's memory its pages, as it has them once it has run for long."""
    for link in Path(f"/proc/{guest.qemu.pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:memory-backend-memfd"):
            with link.open("r+b") as memory:
                os.posix_fallocate(memory.fileno(), 0, os.fstat(memory.fileno()).st_size)
            return
    raise AssertionError("QEMU has no memfd.")


def leave_it(guest: Guest, memory: int) -> None:
    """Leave the guest `memory` bytes and wait until that is done, to within what it cannot spare."""

    def has_it() -> bool:
        answer: Any = guest.qemu.qmp.execute("query-balloon")
        return abs(int(answer["actual"]) - memory) < 8 * MIB

    guest.qemu.qmp.execute("balloon", {"value": memory})
    wait_until(has_it, f"the guest has {memory // MIB} MiB", timeout_s=60)


def test_memory_that_a_balloon_gave_back_is_not_served(
    gateway: GatewayProcess, guest_host: GuestHost
) -> None:
    gateway.serve("disk", kind="file", size=64 * MIB, queues=2)
    with guest_host.boot(gateway, "disk", more=("-device", "virtio-balloon-pci")) as guest:
        whole = guest.qemu.config.memory_bytes
        allocate_memory(guest)
        gateway.kill()
        gateway.start()
        gateway.wait_for("the guest's queues", lambda client: client.attachment("disk").state == "running")
        script = fio_command(JOB)
        busy = f"until [ -e /tmp/enough ]; do {script} >/tmp/said || {{ cat /tmp/said; exit 1; }}; done"
        work = guest.start(busy)
        for _ in range(ROUNDS):
            leave_it(guest, whole // 2)
            leave_it(guest, whole)
            # Its buffers lie in memory that the guest has just had back.
            guest.fio(replace(JOB, name="after", extra=("--offset=16M",)))
        guest.run("touch /tmp/enough")
        work.wait(timeout_s=120)
        guest.shutdown()
