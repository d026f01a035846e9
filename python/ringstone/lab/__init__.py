"""A whole cluster on one machine: Ceph, etcd, and hosts with a gateway each, as processes of this one."""
