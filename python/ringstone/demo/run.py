"""Runs the demo step by step: gateway, volume, guest, measured shapes, then verification over a reboot."""

import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ringstone import models
from ringstone.demo import snapshots
from ringstone.demo.gateway import GatewayProcess
from ringstone.demo.plan import (
    FIO_ENGINE,
    POOL,
    VERIFY_BYTES,
    VOLUME,
    Check,
    DemoOptions,
    DemoResult,
    Latency,
    Measurement,
    Shape,
    fill,
    shapes,
    verified_write,
)
from ringstone.hypervisor.accelerator import Accelerator, choose_accelerator
from ringstone.hypervisor.args import Disk
from ringstone.hypervisor.fio import FioDirection, FioJob
from ringstone.hypervisor.guest import CommandFailed, Guest
from ringstone.hypervisor.guest_image import GuestImage, ensure_guest_image
from ringstone.hypervisor.qemu import QemuConfig
from ringstone.hypervisor.versions import QEMU
from ringstone.progress import Progress
from ringstone.rates import reactor_rates, totals
from ringstone.stats import Histogram, Snapshot, StatsPage, bucket_edges
from ringstone.units import format_rate, format_size

GUEST_CPUS = 2
GUEST_MEMORY = 512 << 20
# Beside the volume's size, in a store.
_SPARE = 512 << 20


def run_demo(options: DemoOptions, progress: Progress) -> DemoResult:
    """The whole demo. What it starts is ended and what it writes removed (but for `options.keep`), however it
    ends.

    Raises RingstoneError when something cannot be started; a failed verification is a failed check of the
    result.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        with progress.step("Guest image") as step:
            image = ensure_guest_image(report=lambda text: setattr(step, "detail", text))
            step.detail = f"Linux {image.kernel_version}"
        with progress.step("Accelerator") as step:
            accelerator = choose_accelerator(image, options.accelerator)
            step.detail = f"{accelerator.name.upper()}. {accelerator.reason}"
        folder = stack.enter_context(_folder(options))
        gateway = GatewayProcess(folder)
        with progress.step("Gateway") as step:
            stack.enter_context(gateway)
            step.detail = f"process {gateway.pid}, control API at {gateway.socket}"
        with progress.step("Pool and volume") as step:
            attachment = _make_volume(gateway, options, stack)
            step.detail = (
                f"{format_size(options.size)} in a {options.pool} pool, served at {attachment.socket}"
            )
        stats = stack.enter_context(StatsPage(gateway.stats_path))
        with progress.step("Guest boots") as step:
            guest = stack.enter_context(_boot(image, accelerator, [attachment], folder / "guest"))
            step.detail = guest.output("cat /proc/version").split(" (")[0]
        volume = gateway.client.volume(VOLUME)
        setting = _setting(options, volume, attachment, accelerator, image, gateway)
        with progress.step("Fill what will be read") as step:
            filled = guest.fio(fill(options.size)).write
            step.detail = f"{format_size(round(filled.bytes_per_second))}/s"
        measurements = [
            _measure(shape, guest, stats, progress) for shape in shapes(options.seconds, options.size)
        ]
        checks = _verify(guest, stats, progress)
        if options.pool == "store":

            def boot(attached: list[models.Attachment]) -> AbstractContextManager[Guest]:
                return _boot(image, accelerator, attached, folder / "second-guest")

            checks += snapshots.overwritten(guest, gateway.client, progress)
            guest, found = snapshots.reverted(guest, gateway.client, boot, stack, progress, GUEST_CPUS)
            checks += found
        with progress.step("Shut down") as step:
            checks += _shut_down(guest, gateway, stats, options)
            step.detail = "guest and gateway have ended"
    kept = str(folder) if options.keep else None
    return DemoResult(setting, measurements, checks, time.monotonic() - began, kept)


@contextmanager
def _folder(options: DemoOptions) -> Iterator[Path]:
    """Where state, sockets, logs and a file pool go: $TMPDIR, or /var/tmp, since /tmp is in memory on many
    machines."""
    parent = os.environ.get("TMPDIR", "/var/tmp")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ringstone-demo-", dir=parent))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _make_volume(gateway: GatewayProcess, options: DemoOptions, stack: ExitStack) -> models.Attachment:
    client = gateway.client
    memory = None
    if options.pool == "memory":
        # Volumes in memory are files too, and the gateway would not come back to remove them after a crash.
        memory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ringstone-demo-", dir="/dev/shm"))
    # A thin volume of a store takes what is written; a snapshot keeps what is overwritten.
    store = models.StoreOptions(size=options.size + _SPARE) if options.pool == "store" else None
    client.create_pool(models.PoolCreate(name=POOL, type=options.pool, path=memory, store=store))
    client.create_volume(VOLUME, pool=POOL, size=options.size)
    return client.attach(VOLUME, queues=GUEST_CPUS)


def _boot(
    image: GuestImage, accelerator: Accelerator, attached: list[models.Attachment], folder: Path
) -> AbstractContextManager[Guest]:
    disks = [Disk(one.socket, one.volume, one.queues) for one in attached]
    return Guest(
        QemuConfig(image, accelerator.name, folder, disks, cpus=GUEST_CPUS, memory_bytes=GUEST_MEMORY)
    )


# Measuring.


def _measure(shape: Shape, guest: Guest, stats: StatsPage, progress: Progress) -> Measurement:
    with progress.step(shape.title) as step:
        before = stats.read()
        result = guest.fio(shape.job)
        after = stats.read()
        reads = shape.job.pattern == "randread"
        seen = result.read if reads else result.write
        measurement = Measurement(
            title=shape.title,
            direction="read" if reads else "write",
            iops=seen.iops,
            bytes_per_second=seen.bytes_per_second,
            guest=_guest_latency(seen),
            gateway=_gateway_latency(before, after, reads),
            busy=_busy(before, after),
        )
        step.detail = f"{format_rate(seen.iops)} IOPS"
    return measurement


def _guest_latency(seen: FioDirection) -> Latency:
    # fio names a bin by its middle; the neighbours' middles tell how wide it is.
    middles = [ns for ns, _ in seen.histogram]
    bins = []
    for index, (ns, requests) in enumerate(seen.histogram):
        lower = (middles[index - 1] + ns) // 2 if index else ns
        upper = (ns + middles[index + 1]) // 2 if index + 1 < len(middles) else ns
        # After a gap the neighbour is far; a bin of fio is at most 1/64 of its latency wide.
        half = max(ns // 128, 1)
        bins.append((max(lower, ns - half), min(upper, ns + half), requests))
    p50, p99, p999 = (seen.percentile_ns(share) for share in (50.0, 99.0, 99.9))
    return Latency(seen.operations, seen.mean_ns, p50, p99, p999, bins)


def _gateway_latency(before: Snapshot, after: Snapshot, reads: bool) -> Latency | None:
    def histogram(snapshot: Snapshot) -> Histogram:
        counted = totals(snapshot, VOLUME)
        return counted.read_latency if reads else counted.write_latency

    grown = histogram(after).since(histogram(before))
    mean = grown.mean()
    if mean is None:
        return None
    p50, p99, p999 = (grown.percentile(share) or 0 for share in (0.5, 0.99, 0.999))
    bins = [(*bucket_edges(bucket), requests) for bucket, requests in sorted(grown.buckets.items())]
    return Latency(grown.count, mean, p50, p99, p999, bins)


def _busy(before: Snapshot, after: Snapshot) -> float:
    rates = reactor_rates(before, after)
    return sum(rate.busy for rate in rates) / len(rates)


# Verifying.


def _verify(guest: Guest, stats: StatsPage, progress: Progress) -> list[Check]:
    job = verified_write()
    before = totals(stats.read(), VOLUME).counters
    with progress.step(f"Verified write of {format_size(VERIFY_BYTES)}, flush") as step:
        written = _verification("Blocks written, read back and their CRC-32C checked", guest, job)
        guest.run("sync")
        step.detail = _word(written)
    flushes = totals(stats.read(), VOLUME).counters["flushes"] - before["flushes"]
    flushed = Check("The guest's flush reached the gateway", flushes > 0, f"{flushes} flush requests")
    with progress.step("Guest reboots") as step:
        old_boot = guest.boot_id
        guest.reboot()
        step.detail = "a new kernel runs"
    rebooted = Check(
        "The guest has restarted", guest.boot_id != old_boot, f"boot {old_boot[:8]}, then {guest.boot_id[:8]}"
    )
    with progress.step("Verification after the reboot") as step:
        again = _verification("The same blocks checked after the reboot", guest, replace(job, verify="only"))
        step.detail = _word(again)
    return [written, flushed, rebooted, again]


def _verification(title: str, guest: Guest, job: FioJob) -> Check:
    try:
        result = guest.fio(job)
    except CommandFailed as error:
        return Check(title, False, str(error))
    blocks = VERIFY_BYTES // job.block_size
    checked = result.read.operations
    return Check(title, checked == blocks, f"{checked} of {blocks} blocks of {format_size(job.block_size)}")


def _word(check: Check) -> str:
    return check.detail if check.passed else "FAILED"


def _shut_down(guest: Guest, gateway: GatewayProcess, stats: StatsPage, options: DemoOptions) -> list[Check]:
    complaints = guest.run("dmesg | grep -i 'I/O error'", check=False).stdout.strip().splitlines()
    guest.shutdown()
    errors = totals(stats.read(), VOLUME).counters["errors"]
    gateway.client.detach(VOLUME)
    if options.pool == "store":
        snapshots.put_away(gateway.client)
    status = gateway.stop()
    detail = (
        complaints[0] if complaints else f"{errors} errors counted by the gateway, none seen by the guest"
    )
    return [
        Check("No request was answered with an error", errors == 0 and not complaints, detail),
        Check("The gateway has ended in order", status == 0, f"exit status {status}"),
    ]


# The setting.


def _setting(
    options: DemoOptions,
    volume: models.Volume,
    attachment: models.Attachment,
    accelerator: Accelerator,
    image: GuestImage,
    gateway: GatewayProcess,
) -> list[tuple[str, str]]:
    info = gateway.client.info()
    cores = ", ".join(map(str, info.cores))
    return [
        ("Machine", f"{_cpu_model()}, {os.cpu_count()} CPUs, Linux {platform.release()}"),
        ("Hypervisor", f"{_qemu_version()}, {accelerator.name.upper()}. {accelerator.reason}"),
        ("Guest", f"Linux {image.kernel_version}, {GUEST_CPUS} vCPUs, {format_size(GUEST_MEMORY)} of memory"),
        (
            "Volume",
            f"{format_size(volume.size)} in a {options.pool} pool, blocks of {volume.block_size} B, "
            f"{attachment.queues} queues, {volume.detail or 'not attached'}",
        ),
        ("Gateway", f"Ringstone {info.version}, reactors on CPU {cores}, idle after {info.idle_us} us"),
        (
            "Load",
            f"fio, {options.seconds:g} s per shape, {FIO_ENGINE} where the depth is above 1, direct I/O",
        ),
    ]


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _qemu_version() -> str:
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\S+)", said)
    return f"QEMU {found[1]}" if found else "QEMU"
