"""A guest on a host of the lab."""

from ringstone import models
from ringstone.hypervisor.fio import FioJob
from ringstone.lab.lab import Lab


def test_a_guest_uses_a_volume_of_a_host(lab: Lab) -> None:
    host = lab.hosts["b"]
    with host.client() as client:
        client.create_pool(models.PoolCreate(name="memory", type="memory", path=str(host.folder / "memory")))
        client.create_volume("disk", pool="memory", size=64 << 20)
        client.attach("disk", queues=1)
        try:
            with lab.boot("b", "disk") as guest:
                written = guest.fio(FioJob("verified", "randwrite", size=8 << 20, verify="write"))
                assert written.read.operations == (8 << 20) // 4096
        finally:
            client.detach("disk", force=True)
            client.delete_volume("disk")
            client.delete_pool("memory")
