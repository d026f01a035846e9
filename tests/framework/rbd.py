"""Pools of a gateway on a Ceph cluster of the lab."""

from ringstone import models
from ringstone.lab.ceph import CephCluster
from tests.framework.gateway import GatewayProcess


def make_rbd_pool(gateway: GatewayProcess, ceph: CephCluster, name: str = "ceph") -> models.Pool:
    """A pool `name` over the cluster's pool `rbd`, as a user that may use only that."""
    where = models.RbdOptions(conf=str(ceph.conf_path), user="client.ringstone", ceph_pool="rbd")
    with gateway.client() as client:
        return client.create_pool(models.PoolCreate(name=name, type="rbd", rbd=where))
