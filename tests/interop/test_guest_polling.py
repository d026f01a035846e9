"""A Linux driver that is called for no completion: it has queues that it polls."""

from ringstone.hypervisor.fio import FioJob
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost

MIB = 1 << 20
# IORING_SETUP_IOPOLL: whoever waits looks for the completion itself.
POLLED = ("--hipri=1",)


def test_polled_queues_are_served_beside_the_others(guest_host: GuestHost) -> None:
    with GatewayProcess() as gateway:
        gateway.start().serve("disk", kind="file", size=64 * MIB, queues=2)
        with guest_host.boot(gateway, "disk", kernel_arguments="virtio_blk.poll_queues=1") as guest:
            assert "1/0/1 default/read/poll queues" in guest.output("dmesg")
            assert guest.output("cat /sys/block/vda/queue/io_poll") == "1"
            polled = FioJob(
                "polled", "randwrite", engine="io_uring", depth=16, size=4 * MIB, verify="write", extra=POLLED
            )
            plain = FioJob("plain", "randwrite", engine="io_uring", depth=16, size=4 * MIB, verify="write")
            with gateway.client() as client:
                for job, queue in ((polled, 1), (plain, 0)):
                    before = client.stats(volume="disk").of_volume("disk")
                    assert guest.fio(job).write.operations == 1024
                    after = client.stats(volume="disk").of_volume("disk")
                    grown = [now.writes - then.writes for then, now in zip(before, after, strict=True)]
                    assert grown[queue] >= 1024, job.name
            guest.shutdown()
