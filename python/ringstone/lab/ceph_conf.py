"""The configuration and the keys of a lab's Ceph cluster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What a client of RBD pools may do: images and locks, and to blocklist a client that has lost its lock.
RBD_CAPS: Mapping[str, str] = {"mon": "profile rbd", "osd": "profile rbd", "mgr": "profile rbd"}
ADMIN_CAPS: Mapping[str, str] = {"mon": "allow *", "osd": "allow *", "mgr": "allow *", "mds": "allow *"}
_OSD_CAPS: Mapping[str, str] = {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"}
_MGR_CAPS: Mapping[str, str] = {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"}
_MON_CAPS: Mapping[str, str] = {"mon": "allow *"}
# A secret, and what it allows, by the kind of daemon.
Key = tuple[str, Mapping[str, str]]


@dataclass(frozen=True)
class CephSettings:
    """What a test may want otherwise. Sizes are bytes, times seconds.

    `size` and `min_size` are those of pools made without asking for others. A killed OSD is noticed at once (its port
    refuses); a stopped one after `heartbeat_grace_s`, which is long enough for a machine that is busy with something
    else. An OSD that stays down is given up, and its data copied elsewhere, after `down_out_s`.
    """

    osds: int = 3
    size: int = 3
    min_size: int = 2
    osd_bytes: int = 4 << 30
    heartbeat_grace_s: int = 8
    down_out_s: int = 600


def configuration(folder: Path, fsid: str, address: str, ports: Sequence[int], settings: CephSettings) -> str:
    """The text of ceph.conf; `ports` are the monitor's, of the second protocol and of the first."""
    second, first = ports
    return f"""\
# Written for one run of the lab.
[global]
fsid = {fsid}
mon_host = [v2:{address}:{second}/0,v1:{address}:{first}/0]
public_addr = {address}
cluster_addr = {address}
keyring = {folder}/keyrings/$name.keyring
run_dir = {folder}/run
crash_dir = {folder}/crash
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
ms_async_op_threads = 1
# The manager tells the OSDs how often to report.
mgr_stats_period = 1
# The monitor reads these too.
osd_heartbeat_interval = 1
osd_heartbeat_grace = {settings.heartbeat_grace_s}
# A placement group waits after a change for so much of the grace, in case its former primary still answers reads.
osd_pool_default_read_lease_ratio = 0.25
osd_pool_default_size = {settings.size}
osd_pool_default_min_size = {settings.min_size}
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off

[client]
log_file =
admin_socket =

[mon]
mon_data = {folder}/$name
log_file =
log_to_stderr = true
admin_socket = {folder}/run/$name.asok
mon_allow_pool_delete = true
mon_allow_pool_size_one = true
# A map is proposed at once: nothing else is likely to come within the second that a large cluster waits.
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_tick_interval = 1
mon_mgr_digest_period = 1
mon_mgr_beacon_grace = 15
# All OSDs are on one host.
osd_crush_chooseleaf_type = 0
mon_osd_reporter_subtree_level = osd
mon_osd_min_down_reporters = 1
mon_osd_adjust_heartbeat_grace = false
mon_osd_adjust_down_out_interval = false
mon_osd_laggy_weight = 0
mon_osd_down_out_interval = {settings.down_out_s}
mon_osd_down_out_subtree_limit = root
mon_data_avail_warn = 1
mon_data_avail_crit = 0
mon_warn_on_pool_no_redundancy = false
auth_allow_insecure_global_id_reclaim = false
mon_rocksdb_options = write_buffer_size=4194304,compression=kNoCompression

[mgr]
mgr_data = {folder}/$name
log_file =
log_to_stderr = true
admin_socket = {folder}/run/$name.asok
# An empty folder: a lab has no use for modules, and each takes Python's time to load at every start.
mgr_module_path = {folder}/modules
mgr_initial_modules =
mgr_tick_period = 1

[osd]
osd_data = {folder}/$name
log_file =
log_to_stderr = true
admin_socket = {folder}/run/$name.asok
osd_objectstore = bluestore
bluestore_block_size = {settings.osd_bytes}
bluestore_block_create = true
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
bluestore_rocksdb_options = compression=kNoCompression,max_write_buffer_number=4,write_buffer_size=8388608,\
max_background_compactions=1
osd_memory_target = 939524096
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
osd_mon_heartbeat_interval = 5
osd_beacon_report_interval = 5
osd_mon_report_interval = 1
osd_recovery_sleep = 0
osd_recovery_delay_start = 0
osd_class_update_on_start = false
osd_max_markdown_count = 100000
"""


def keyring_text(keys: Mapping[str, Key]) -> str:
    """A keyring file with secrets and capabilities by name ("client.admin")."""
    lines = []
    for name, (key, caps) in keys.items():
        lines += [f"[{name}]", f"\tkey = {key}"]
        lines += [f'\tcaps {daemon} = "{allowed}"' for daemon, allowed in caps.items()]
    return "\n".join(lines) + "\n"


def first_keys(osds: int, new_key: Callable[[], str]) -> dict[str, Key]:
    """Of all that a monitor must know from its birth, so that nobody has to be introduced later. `new_key` makes a
    secret."""
    keys: dict[str, Key] = {"mon.": (new_key(), _MON_CAPS), "client.admin": (new_key(), ADMIN_CAPS)}
    keys["client.ringstone"] = (new_key(), RBD_CAPS)
    keys["mgr.a"] = (new_key(), _MGR_CAPS)
    return keys | {f"osd.{number}": (new_key(), _OSD_CAPS) for number in range(osds)}
