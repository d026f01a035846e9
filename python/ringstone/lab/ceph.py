"""A Ceph cluster of our own processes: one monitor, one manager, some OSDs with BlueStore on sparse files.

Debian's programs, run directly: no systemd, no cephadm, nothing outside the cluster's folder, and cephx is on. A test
reads like an operator's notes: `cluster.kill_osd(1); ...; cluster.start_osd(1); cluster.wait_healthy()`.
"""

import errno
import json
import select
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ringstone.errors import RingstoneError
from ringstone.lab import ceph_commands
from ringstone.lab.ceph_conf import RBD_CAPS, CephSettings, Key, configuration, first_keys, keyring_text
from ringstone.lab.folders import make_folder
from ringstone.lab.process import (
    Daemon,
    LabError,
    ending_with_us,
    free_ports,
    log_tail,
    need,
    own_environment,
    run,
)

POOL = "rbd"
# Of the gateway, say: images of all RBD pools, and nothing else.
CLIENT = "ringstone"

_PACKAGES = {
    "ceph-mon": "ceph-mon",
    "ceph-mgr": "ceph-mgr",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "rbd": "ceph-common",
}
# Debian's librados binding is for Debian's Python.
_SYSTEM_PYTHON = "/usr/bin/python3"
_START_SECONDS = 180.0
_COMMAND_SECONDS = 30.0
_EVENT_SECONDS = 60.0
_POLL_SECONDS = 0.1
# Another cluster's variables would lead our processes there.
_NO_OTHER = dict.fromkeys(("CEPH_ARGS", "CEPH_CONF", "CEPH_KEYRING", "CEPH_LIB", "CEPH_DEV"))
_FULL_RATIOS = (("nearfull", 0.85), ("backfillfull", 0.9), ("full", 0.95))


class CephCommandError(RingstoneError):
    """A daemon refused a command; `errno` says why, as a number of errno.h."""

    def __init__(self, command: str, number: int, said: str) -> None:
        super().__init__(f"Ceph refused `{command}` with {errno.errorcode.get(number, number)}: {said}")
        self.errno = number


class CephCluster:
    """Started when entered, and gone with all its files when left. Times are seconds, sizes bytes.

    `address` is where all daemons listen: an address of this machine that all clients reach, a bridge's for clients in
    network namespaces. `folder` is made, and removed at the end; without one it is in memory where there is room.
    """

    def __init__(
        self, folder: Path | None = None, *, address: str = "127.0.0.1", settings: CephSettings | None = None
    ) -> None:
        self.settings = settings or CephSettings()
        self.address = address
        self.fsid = str(uuid.uuid4())
        self._wanted = folder
        self._folder: Path | None = None
        self._daemons: dict[str, Daemon] = {}
        self._commands: _Commands | None = None

    # Where things are.

    @property
    def folder(self) -> Path:
        """All that the cluster has written. LabError when it is not running."""
        if self._folder is None:
            raise LabError("The Ceph cluster does not run. Start it first.")
        return self._folder

    @property
    def conf_path(self) -> Path:
        """What CEPH_CONF and --conf want. It finds the keyrings of all the cluster's own clients."""
        return self.folder / "ceph.conf"

    def keyring_path(self, client: str = CLIENT) -> Path:
        """The keyring of a client: "admin", "ringstone", or one that add_client() made."""
        return self.folder / "keyrings" / f"client.{client}.keyring"

    def environment(self, client: str = CLIENT) -> dict[str, str]:
        """What leads `rbd`, `ceph` and librados to this cluster, as that client."""
        return {"CEPH_CONF": str(self.conf_path), "CEPH_ARGS": f"--name client.{client}"}

    def daemon(self, name: str) -> Daemon:
        """The process "mon.a", "mgr.a" or "osd.N", whether it runs or not."""
        return self._daemons[name]

    def daemons(self) -> list[Daemon]:
        """All of them."""
        return list(self._daemons.values())

    # From nothing to a pool that takes images.

    def start(self) -> Self:
        """Returns when all OSDs are up and in, and the pool `rbd` is ready for images."""
        if self._folder is not None:
            raise LabError("The Ceph cluster runs already. Stop it first.")
        for program, package in _PACKAGES.items():
            need(program, package)
        try:
            self._make_folder()
            self._make_stores()
            self._start_daemons()
            self.create_pool(POOL)
            self.wait_healthy(_START_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def _make_folder(self) -> None:
        if self._wanted is not None:
            self._wanted.mkdir(parents=True)
        self._folder = self._wanted or make_folder("ceph")
        for name in ("keyrings", "run", "crash", "logs", "modules"):
            (self.folder / name).mkdir()
        self._ports = free_ports(self.address, 2)
        self.conf_path.write_text(
            configuration(self.folder, self.fsid, self.address, self._ports, self.settings)
        )
        keys = first_keys(self.settings.osds, self._new_key)
        for name, key in keys.items():
            _write_keyring(self.folder / "keyrings" / f"{name}.keyring", {name: key})
        _write_keyring(self.folder / "first.keyring", keys)
        numbers = [str(number) for number in range(self.settings.osds)]
        for kind, names in (("mon", ["a"]), ("mgr", ["a"]), ("osd", numbers)):
            for name in names:
                self._daemons[f"{kind}.{name}"] = self._make_daemon(kind, name)

    def _new_key(self) -> str:
        """Of the type that this Ceph wants: since 20.2 a monitor refuses keys for AES with 128 bits."""
        return self._run(["ceph-authtool", "--gen-print-key"]).strip()

    def _make_daemon(self, kind: str, name: str) -> Daemon:
        (self.folder / f"{kind}.{name}").mkdir()
        command = [f"ceph-{kind}", "-f", "-i", name, "-c", str(self.conf_path)]
        return Daemon(
            f"{kind}.{name}",
            command,
            logs=self.folder / "logs",
            environment=_NO_OTHER,
            package=f"ceph-{kind}",
            # As a service manager has it. Debian 13's Ceph looks for its classes below "lib/...", rbd's too.
            directory=Path("/"),
        )

    def _make_stores(self) -> None:
        """Each daemon's store, beside each other. An OSD's takes the longest, and needs no monitor."""
        second, first = self._ports
        monmap = self.folder / "monmap"
        where = f"[v2:{self.address}:{second},v1:{self.address}:{first}]"
        run(["monmaptool", "--create", "--addv", "a", where, "--fsid", self.fsid, str(monmap)])
        conf = ["-c", str(self.conf_path), "--mkfs"]
        keyring = str(self.folder / "first.keyring")
        commands = [["ceph-mon", *conf, "-i", "a", "--monmap", str(monmap), "--keyring", keyring]]
        self._uuids = [str(uuid.uuid4()) for _ in range(self.settings.osds)]
        commands += [
            ["ceph-osd", *conf, "-i", str(number), "--osd-uuid", own, "--no-mon-config"]
            for number, own in enumerate(self._uuids)
        ]
        with ThreadPoolExecutor(len(commands)) as threads:
            list(threads.map(self._run, commands))

    def _start_daemons(self) -> None:
        self.daemon("mon.a").start()
        self.daemon("mgr.a").start()
        self.daemon("mon.a").wait("listened", self._mon_listens, _START_SECONDS)
        self._commands = _Commands(self)
        for number, own in enumerate(self._uuids):
            self._mon("osd new", uuid=own, id=number, timeout_s=_START_SECONDS)
        for number in range(self.settings.osds):
            self.daemon(f"osd.{number}").start()
        # The modules that are not loaded, to save their time, are always on to Ceph.
        self.command("health mute", code="MGR_MODULE_ERROR", sticky=True)
        # A client that finds none up looks again only after five seconds.
        self.wait_for("OSDs", self._first_all_up, timeout_s=_START_SECONDS)

    def _mon_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self._ports[0])) == 0

    def _first_all_up(self, status: Any) -> bool:
        """Whether all OSDs have come up; LabError at once when a daemon could not."""
        for daemon in self.daemons():
            if not daemon.running():
                raise LabError(daemon.describe(f"{daemon.name} ended before all OSDs were up"))
        return self._all_up(status)

    def stop(self) -> None:
        """End all daemons and remove the folder. Nothing is worth an orderly end here. Idempotent."""
        if self._commands is not None:
            self._commands.close()
            self._commands = None
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        self._daemons.clear()
        if self._folder is not None:
            folder, self._folder = self._folder, None
            shutil.rmtree(folder)

    # Asking.

    def command(self, prefix: str, *, target: str = "mon", **arguments: object) -> Any:
        """What `ceph PREFIX` answers as JSON, or its text where it is none: `command("osd dump")`,
        `command("osd pool get", pool="rbd", var="size")`. `target`: "mon", "mgr" or "osd.N". The arguments have the
        names that `ceph --verbose` shows. CephCommandError when it is refused."""
        return self._ask(target, prefix, arguments, _COMMAND_SECONDS)

    def _mon(self, prefix: str, *, timeout_s: float = _COMMAND_SECONDS, **arguments: object) -> Any:
        return self._ask("mon", prefix, arguments, timeout_s)

    def _ask(self, target: str, prefix: str, arguments: Mapping[str, object], timeout_s: float) -> Any:
        if self._commands is None:
            raise LabError("The Ceph cluster does not run. Start it first.")
        return self._commands.ask(target, {"prefix": prefix, **arguments}, timeout_s)

    def admin(self, daemon: str, *command: str) -> Any:
        """What a daemon's admin socket answers, also when the monitor is gone: `admin("osd.0", "perf", "dump")`."""
        path = self.folder / "run" / f"{daemon}.asok"
        return json.loads(self._run(["ceph", "--admin-daemon", str(path), *command]))

    def rbd(self, *arguments: str, client: str = CLIENT, timeout_s: float = 60) -> str:
        """What `rbd ARGUMENTS` prints."""
        where = ["--conf", str(self.conf_path), "--name", f"client.{client}"]
        return self._run(["rbd", *where, *arguments], timeout_s=timeout_s)

    def _run(self, command: Sequence[str], timeout_s: float = _START_SECONDS) -> str:
        return run(command, package=_PACKAGES.get(command[0]), timeout_s=timeout_s, environment=_NO_OTHER)

    def status(self) -> Any:
        """What `ceph status` says, as JSON."""
        return self.command("status")

    def blocklist(self) -> list[str]:
        """The addresses of clients that may not do any I/O ("10.0.0.2:0/123")."""
        # Two lists, one behind the other: of clients, and of ranges of addresses.
        listed, _ = json.JSONDecoder().raw_decode(self.command("osd blocklist ls"))
        return [str(entry["addr"]) for entry in listed]

    # Waiting.

    def wait_for(
        self, what: str, condition: Callable[[Any], bool], *, prefix: str = "status", timeout_s: float
    ) -> Any:
        """Ask `prefix` until `condition` holds for the answer, which is returned. LabError names `what` did not come,
        and shows the daemons' logs."""
        deadline = time.monotonic() + timeout_s
        said: Any = None
        while True:
            try:
                said = self._ask("mon", prefix, {}, max(1.0, deadline - time.monotonic()))
                if condition(said):
                    return said
            except CephCommandError as error:
                said = str(error)
            if time.monotonic() > deadline:
                raise LabError(self._describe(f"Waited {timeout_s:g} s for Ceph's {what}", said))
            time.sleep(_POLL_SECONDS)

    def wait_healthy(self, timeout_s: float = _EVENT_SECONDS) -> None:
        """Until every OSD is up and in and every placement group active and clean."""
        self.wait_for("health", self._healthy, timeout_s=timeout_s)

    def _healthy(self, status: Any) -> bool:
        groups = status["pgmap"]
        clean = sum(
            state["count"] for state in groups["pgs_by_state"] if state["state_name"] == "active+clean"
        )
        # The manager counts, and may not have heard of the newest pool yet.
        return (
            self._all_up(status)
            and clean == groups["num_pgs"]
            and groups["num_pools"] == len(self.command("osd pool ls"))
            and bool(status["mgrmap"]["available"])
            and self._peered()
        )

    def _peered(self) -> bool:
        """Whether what is known of each placement group is from after its OSDs' last start: reports come late, and
        one from before says that all is well."""
        since = {osd["osd"]: osd["up_from"] for osd in self.command("osd dump")["osds"]}
        groups = self.command("pg dump", target="mgr", dumpcontents=["pgs"])["pg_stats"]
        # A manager that has just begun knows no OSD of a group.
        return all(
            group["acting"] and int(group["reported_epoch"]) >= max(since[osd] for osd in group["acting"])
            for group in groups
        )

    def _all_up(self, status: Any) -> bool:
        osds = status["osdmap"]
        return bool(osds["num_up_osds"] == osds["num_in_osds"] == self.settings.osds)

    def wait_osd_down(self, number: int, timeout_s: float = _EVENT_SECONDS) -> None:
        """Until the cluster has noticed that an OSD is gone."""
        self._wait_osd(number, up=False, timeout_s=timeout_s)

    def wait_osd_up(self, number: int, timeout_s: float = _EVENT_SECONDS) -> None:
        """Until an OSD takes part again; wait_healthy() also waits for its data."""
        self._wait_osd(number, up=True, timeout_s=timeout_s)

    def _wait_osd(self, number: int, *, up: bool, timeout_s: float) -> None:
        def reached(dump: Any) -> bool:
            return bool(dump["osds"][number]["up"]) == up

        what = f"osd.{number} {'up' if up else 'down'}"
        self.wait_for(what, reached, prefix="osd dump", timeout_s=timeout_s)

    def _describe(self, problem: str, said: object) -> str:
        parts = [f"{problem}. The last answer: {json.dumps(said)[:2000]}"]
        for daemon in self.daemons():
            state = f"process {daemon.pid}" if daemon.running() else "does not run"
            parts.append(f"--- {daemon.name} ({state}), {daemon.log}:\n{daemon.tail()}")
        return "\n".join(parts)

    # Pools and clients.

    def create_pool(self, name: str, *, pgs: int = 8, size: int | None = None) -> None:
        """A replicated pool that takes images. With `size` 1 it loses data with an OSD."""
        copies = size or self.settings.size
        sure = {"yes_i_really_mean_it": True} if copies == 1 else {}
        self._mon("osd pool create", pool=name, pg_num=pgs, pgp_num=pgs, pool_type="replicated", size=copies)
        if size is not None:
            self._mon("osd pool set", pool=name, var="size", val=str(copies), **sure)
            least = max(1, min(copies - 1, self.settings.min_size))
            self._mon("osd pool set", pool=name, var="min_size", val=str(least))
        self.rbd("pool", "init", name, client="admin")

    def delete_pool(self, name: str) -> None:
        """With all that is in it."""
        self._mon("osd pool delete", pool=name, pool2=name, yes_i_really_really_mean_it=True)

    def add_client(self, name: str, caps: Mapping[str, str] = RBD_CAPS) -> Path:
        """A client of that name with these capabilities; its keyring."""
        flat = [part for pair in caps.items() for part in pair]
        said = self._mon("auth get-or-create", entity=f"client.{name}", caps=flat)
        path = self.keyring_path(name)
        _write_keyring(path, {f"client.{name}": (said[0]["key"], {})})
        return path

    def set_quota(self, pool: str, max_bytes: int) -> None:
        """The pool is full from so many bytes on; 0 takes the quota away. Ceph notices within seconds:
        wait_pool_full()."""
        self._mon("osd pool set-quota", pool=pool, field="max_bytes", val=str(max_bytes))

    def wait_pool_full(self, pool: str, *, full: bool = True, timeout_s: float = _EVENT_SECONDS) -> None:
        """Until the cluster has marked the pool full, or no longer has."""

        def reached(dump: Any) -> bool:
            flags = next(one["flags_names"] for one in dump["pools"] if one["pool_name"] == pool)
            return ("full" in flags.split(",")) == full

        what = f"pool {pool} {'full' if full else 'with room'}"
        self.wait_for(what, reached, prefix="osd dump", timeout_s=timeout_s)

    def set_full(self, full: bool) -> None:
        """As if every OSD were full, by lowering the ratios from which one is; returns when all pools are (are no
        longer) marked."""
        for name, ratio in _FULL_RATIOS:
            self._mon(f"osd set-{name}-ratio", ratio=0.0001 if full else ratio)
        for pool in self.command("osd dump")["pools"]:
            self.wait_pool_full(pool["pool_name"], full=full)

    # What goes wrong.

    def kill_osd(self, number: int) -> None:
        """SIGKILL."""
        self.daemon(f"osd.{number}").kill()

    def start_osd(self, number: int) -> None:
        """Start one that was killed, and wait until it is up."""
        self.daemon(f"osd.{number}").start()
        self.wait_osd_up(number)

    def pause_osd(self, number: int) -> None:
        """SIGSTOP: it holds its connections and does not answer."""
        self.daemon(f"osd.{number}").pause()

    def resume_osd(self, number: int) -> None:
        """SIGCONT."""
        self.daemon(f"osd.{number}").resume()

    def kill_mon(self) -> None:
        """SIGKILL. There is no other monitor: OSDs go on with what they know, commands wait."""
        self.daemon("mon.a").kill()

    def start_mon(self) -> None:
        """Start it again, and wait until it answers."""
        self.daemon("mon.a").start()
        self.wait_for("monitor", lambda _: True, timeout_s=_EVENT_SECONDS)

    def kill_mgr(self) -> None:
        """SIGKILL. I/O goes on; the state of placement groups is not reported."""
        self.daemon("mgr.a").kill()

    def start_mgr(self) -> None:
        """Start it again, and wait until the monitor knows that it is a new one."""
        former = self.command("mgr dump")["active_gid"]
        self.daemon("mgr.a").start()
        self.wait_for(
            "manager",
            lambda dump: bool(dump["available"]) and dump["active_gid"] != former,
            prefix="mgr dump",
            timeout_s=_EVENT_SECONDS,
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Commands:
    """The connected process of ceph_commands.py, started when it is first needed and again after a command that was
    never answered."""

    def __init__(self, cluster: CephCluster) -> None:
        keyring = str(cluster.keyring_path("admin"))
        script = ceph_commands.__file__
        self._command = ending_with_us(
            [_SYSTEM_PYTHON, "-I", script, str(cluster.conf_path), keyring, "client.admin"]
        )
        self._log = cluster.folder / "logs" / "commands.log"
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, target: str, command: dict[str, Any], timeout_s: float) -> Any:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        request = {"target": target, "command": command, "timeout_s": max(1, round(timeout_s))}
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        ready, _, _ = select.select([child.stdout], [], [], timeout_s)
        line = child.stdout.readline() if ready else b""
        prefix = str(command["prefix"])
        if not line:
            self.close()
            if ready:
                raise LabError(f"The process that asks Ceph ended at `{prefix}`: {log_tail(self._log)}")
            raise CephCommandError(prefix, errno.ETIMEDOUT, f"no answer within {timeout_s:g} s")
        said = json.loads(line)
        if said["status"]:
            raise CephCommandError(prefix, said["status"], said["error"])
        try:
            return json.loads(said["output"])
        except json.JSONDecodeError:
            return said["output"]

    def _start(self) -> subprocess.Popen[bytes]:
        need(_SYSTEM_PYTHON, "python3")
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=own_environment(_NO_OTHER),
                start_new_session=True,
            )
        return self._child

    def close(self) -> None:
        """It has nothing to lose."""
        if self._child is not None:
            child, self._child = self._child, None
            child.kill()
            child.communicate()


def _write_keyring(path: Path, keys: Mapping[str, Key]) -> None:
    path.touch(0o600)
    path.write_text(keyring_text(keys))
