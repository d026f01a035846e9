"""Volumes come and go while a guest works on another one, which must not notice."""

from dataclasses import replace

import pytest

from ringstone.client import GatewayClient
from ringstone.hypervisor.fio import FioJob, fio_command, parse_fio
from ringstone.hypervisor.guest import Guest
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost, disk_of, wait_until

MIB = 1 << 20


def _come_and_go(name: str, gateway: GatewayProcess, client: GatewayClient, guest: Guest) -> None:
    attachment = gateway.serve(name, kind="memory", size=16 * MIB, queues=1)
    guest.plug(attachment.socket, name=name)
    wait_until(lambda: disk_of(guest, gateway, name) is not None, "the guest has the new disk")
    disk = f"/dev/{disk_of(guest, gateway, name)}"
    job = FioJob("new", "randwrite", size=MIB, filename=disk, verify="write")
    assert guest.fio(job).write.operations == 256
    guest.unplug(name)
    wait_until(lambda: client.attachment(name).peer_pid is None, "the frontend is gone")
    client.detach(name)
    client.delete_volume(name)


@pytest.mark.parametrize("rounds", [3, pytest.param(60, marks=pytest.mark.soak)])
def test_attaching_and_detaching_disturbs_no_other_volume(guest_host: GuestHost, rounds: int) -> None:
    with GatewayProcess() as gateway:
        gateway.start()
        gateway.serve("busy", kind="file", size=64 * MIB, queues=2)
        with guest_host.boot(gateway, "busy") as guest, gateway.client() as client:
            job = FioJob("busy", "randwrite", engine="io_uring", depth=16, size=24 * MIB, verify="write")
            working = guest.start(fio_command(replace(job, extra=(f"--loops={rounds}",))))
            for number in range(rounds):
                _come_and_go(f"coming-{number}", gateway, client, guest)
            result = parse_fio(working.wait(timeout_s=60 * rounds).stdout)
            assert result.errors == 0
            assert result.write.operations == rounds * 24 * MIB // 4096
            (attachment,) = client.attachments()
            assert (attachment.volume, attachment.state) == ("busy", "running")
            assert guest.output("dmesg | grep -i 'I/O error' || true") == ""
            guest.shutdown()
