"""One image of a Ceph cluster: served by the gateway, used by fio's rbd engine, served by qemu-storage-daemon.

All three go through librbd with one ceph.conf. Each opens the image for its turn and closes it after: the image has
one exclusive lock, and who does not measure is not connected.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ringstone.bench import compare as figures
from ringstone.bench import fio, qemu
from ringstone.bench.compare import Rounds, compare
from ringstone.bench.cpu import Meter
from ringstone.bench.gateway import EngineProcess, reactor_use
from ringstone.bench.load import drive
from ringstone.bench.process import last_line, tied
from ringstone.bench.reports import LoadReport
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.shape import Contender, CpuUse, Measurement, Shape, Window
from ringstone.bench.spread import Bar
from ringstone.errors import StorageError
from ringstone.lab.ceph import CLIENT, POOL, CephCluster
from ringstone.lab.process import run

COMMAND = "ringstone bench rbd"
DEPTHS = (1, 32, 128)
_FILL_SECONDS = 600.0
_SETTINGS = "\n[client]\nrbd_cache = false\n"


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where images go. `user` is without its `client.`."""

    conf: Path
    user: str
    pool: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image that holds data; `conf` is what everybody reads."""

    conf: Path
    user: str
    pool: str
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """The engine with the image as a volume."""

    engine: EngineProcess
    image: Image
    name: str = "ringstone"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        backend = {
            "type": "rbd",
            "conf": str(self.image.conf),
            "user": f"client.{self.image.user}",
            "pool": self.image.pool,
            "image": self.image.name,
        }
        socket = self.engine.serve("rbd", json.dumps(backend), size=self.image.size, queues=shape.queues)
        try:
            before = self.engine.snapshot()
            with Meter(self.engine.pid) as meter:
                report = drive(socket, shape, window, None)
            use = reactor_use(before, self.engine.snapshot(), report.iops)
        finally:
            self.engine.withdraw("rbd")
        return Measurement.of(report, use, _cpu_use(meter, report, window))


@dataclass(frozen=True, slots=True)
class QemuStorageDaemon:
    """qemu-storage-daemon's rbd driver behind its vhost-user-blk export."""

    image: Image
    directory: Path
    name: str = "qemu-storage-daemon"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        blockdev = {
            "driver": "rbd",
            "conf": str(self.image.conf),
            "user": self.image.user,
            "pool": self.image.pool,
            "image": self.image.name,
            # What makes it set rbd_cache to false; it overrides ceph.conf.
            "cache": {"direct": True},
        }
        socket = self.directory / "qemu-rbd.sock"
        line = tied(qemu.exporting(blockdev, socket, shape.queues))
        with qemu.running(line, self.directory) as daemon, Meter(daemon.pid) as meter:
            report = drive(socket, shape, window, None)
        return Measurement.of(report, cpu=_cpu_use(meter, report, window))


@dataclass(frozen=True, slots=True)
class Fio:
    """fio's rbd engine: client and librbd in one process."""

    image: Image
    name: str = "fio rbd"

    def measure(self, shape: Shape, window: Window) -> Measurement:
        engine = (
            "--ioengine=rbd",
            f"--clientname={self.image.user}",
            f"--pool={self.image.pool}",
            f"--rbdname={self.image.name}",
            # One process to take the CPU time of.
            "--thread=1",
        )
        line = tied(fio.job(engine, shape.span_bytes or self.image.size, shape, window))
        environment = os.environ | {"CEPH_CONF": str(self.image.conf)}
        with (
            subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            ) as process,
            Meter(process.pid) as meter,
        ):
            output, errors = process.communicate()
        if process.returncode:
            raise StorageError(f"fio ended with status {process.returncode}: {last_line(errors)}")
        measured = fio.parse(output)
        cores, _ = meter.cores(window.seconds)
        return Measurement(
            measured.iops,
            measured.mean_ns,
            measured.p99_ns,
            cpu=CpuUse(cores * 1e9 / measured.iops),
            raw=measured.raw,
        )


def _cpu_use(meter: Meter, report: LoadReport, window: Window) -> CpuUse:
    cores, reactors = meter.cores(window.seconds)
    each = 1e9 / report.iops
    return CpuUse(cores * each, reactors * each, report.client.cpu_seconds / report.operations * 1e9)


@contextmanager
def cluster_of_the_lab(results: Results) -> Iterator[Cluster]:
    """A cluster for this run, on this machine's own cores."""
    with CephCluster() as ceph:
        results.notes.append(
            f"Ceph: the lab's, {ceph.settings.osds} OSDs on sparse files in {ceph.folder.parent}, "
            f"{ceph.settings.size} copies; it shares the cores with all that is measured."
        )
        yield Cluster(ceph.conf_path, CLIENT, POOL)


@contextmanager
def filled(cluster: Cluster, setting: Setting) -> Iterator[Image]:
    """A new image, written all over, removed at the end."""
    conf = setting.directory / "ceph.conf"
    conf.write_text(cluster.conf.read_text() + _SETTINGS)
    name = f"ringstone-bench-{os.getpid()}"
    rbd = ["rbd", "--conf", str(conf), "--name", f"client.{cluster.user}", "--pool", cluster.pool]
    megabytes = -(-setting.size >> 20)
    _run([*rbd, "create", "--size", f"{megabytes}M", name])
    try:
        setting.progress(f"filling {megabytes} MiB")
        sizes = ("--io-size", "4M", "--io-threads", "4", "--io-total", f"{megabytes}M")
        _run([*rbd, "bench", "--io-type", "write", "--io-pattern", "seq", *sizes, name])
        yield Image(conf, cluster.user, cluster.pool, name, megabytes << 20)
    finally:
        _run([*rbd, "rm", "--no-progress", name])


def _run(command: Sequence[str]) -> None:
    run(command, package="ceph-common", timeout_s=_FILL_SECONDS)


def rbd(
    cluster: Cluster,
    setting: Setting,
    results: Results,
    *,
    depths: Sequence[int] = DEPTHS,
    against: Path | None = None,
) -> None:
    """Adds the rows of one cluster. `against`: another build of Ringstone to measure too (see `bench resilience`)."""
    section = f"one image of a Ceph cluster, {setting.size >> 20} MiB, beside fio's rbd engine"
    with ExitStack() as stack:
        image = stack.enter_context(filled(cluster, setting))
        engine = stack.enter_context(EngineProcess(setting.directory, [setting.cores.server]))
        contenders: list[Contender] = [Fio(image), QemuStorageDaemon(image, setting.directory)]
        if against is not None:
            directory = setting.directory / "earlier"
            directory.mkdir()
            former = EngineProcess(directory, [setting.cores.server], python_path=against.absolute())
            contenders.append(Gateway(stack.enter_context(former), image, "earlier release"))
        contenders.append(Gateway(engine, image))
        for depth in depths:
            for shape in (Shape(depth=depth).sleeping(), Shape(depth=depth).writing().sleeping()):
                taken = compare([(one, shape) for one in contenders], setting.plan, setting.progress)
                results.keep(section, *taken)
                results.rows.extend(_rows(section, taken))


def _rows(section: str, taken: Sequence[Rounds]) -> list[Row]:
    """The last one is the subject, the first one what its bar is beside."""
    *references, ours = taken
    if ours.shape.depth == 1:
        what, unit, figure = "mean", "ns", figures.mean_ns
        bar = Bar("at most 1.05 times fio", at_most=1.05)
    else:
        what, unit, figure = "IOPS", "IOPS", figures.iops
        bar = Bar("not below fio", at_least=1.0)
    rows = []
    for reference in references:
        judged = bar if reference is references[0] else None
        rows.append(_row(section, f"{ours.shape}: {what}", unit, ours, reference, figure, judged))
    for reference in references:
        label = f"{ours.shape}: CPU for each request"
        rows.append(_row(section, label, "ns", ours, reference, figures.cpu_ns, None))
    return rows


def _row(
    section: str,
    what: str,
    unit: str,
    ours: Rounds,
    reference: Rounds,
    figure: Callable[[Measurement], float],
    bar: Bar | None,
) -> Row:
    def values(rounds: Rounds) -> list[float]:
        return [figure(one) for one in rounds.measurements]

    beside = (reference.name, values(reference))
    return Row.beside(section, what, unit, values(ours), beside, _where_cpu_goes(ours, reference), bar)


def _where_cpu_goes(ours: Rounds, reference: Rounds) -> str:
    """CPU time for a request of both, in words."""
    parts = [
        f"{ours.name} {_us(ours, lambda cpu: cpu.ns)} us of CPU: librbd and the rest "
        f"{_us(ours, lambda cpu: cpu.server_ns - cpu.reactor_ns)}, reactor {_us(ours, lambda cpu: cpu.reactor_ns)}",
    ]
    busy = ours.middle(figures.reactor_busy_ns)
    if busy is not None:
        parts[0] += f" (busy {busy / 1000:.1f})"
    parts[0] += f", client {_us(ours, lambda cpu: cpu.client_ns)}"
    parts.append(f"{reference.name} {_us(reference, lambda cpu: cpu.ns)} us")
    return "; ".join(parts)


def _us(rounds: Rounds, part: Callable[[CpuUse], float]) -> str:
    value = rounds.middle(lambda one: part(one.cpu) if one.cpu else None)
    return "?" if value is None else f"{value / 1000:.1f}"
