"""What exists: pools, volumes and attachments, kept over restarts."""

from ringstone.store.base import Store
from ringstone.store.records import AttachmentRecord, PoolRecord, VolumeRecord, VolumeState
from ringstone.store.sqlite import SqliteStore

__all__ = ["AttachmentRecord", "PoolRecord", "SqliteStore", "Store", "VolumeRecord", "VolumeState"]
