"""What exists: hosts, pools, volumes and attachments, kept over restarts. What keeps it in etcd is imported only where
it is used."""

from ringstone.state.base import Store, Watch
from ringstone.state.records import (
    ALIVE,
    ATTACHMENTS,
    HOSTS,
    LOCAL_HOST,
    POOLS,
    VOLUMES,
    AliveRecord,
    AttachmentRecord,
    Change,
    Claim,
    HostRecord,
    PoolRecord,
    VolumeRecord,
    VolumeState,
)
from ringstone.state.sqlite import SqliteStore

__all__ = [
    "ALIVE",
    "ATTACHMENTS",
    "HOSTS",
    "LOCAL_HOST",
    "POOLS",
    "VOLUMES",
    "AliveRecord",
    "AttachmentRecord",
    "Change",
    "Claim",
    "HostRecord",
    "PoolRecord",
    "SqliteStore",
    "Store",
    "VolumeRecord",
    "VolumeState",
    "Watch",
]
