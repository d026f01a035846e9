"""The same guest on the same kind of volume under several QEMUs, which run side by side and are measured in turn."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from ringstone.bench.daemon import GatewayDaemon
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.spread import Bar, interleave
from ringstone.demo.plan import Shape, fill, shapes
from ringstone.errors import InvalidError
from ringstone.hypervisor.accelerator import choose_accelerator
from ringstone.hypervisor.args import Disk
from ringstone.hypervisor.guest import Guest
from ringstone.hypervisor.guest_image import ensure_guest_image
from ringstone.hypervisor.qemu import QemuConfig
from ringstone.hypervisor.versions import QemuVersion
from ringstone.stats import Snapshot

COMMAND = "ringstone bench hypervisors"

_CPUS = 2
_BAR = Bar("at least 0.95", at_least=0.95)


@dataclass(frozen=True, slots=True)
class Hypervisor:
    """A QEMU to measure."""

    program: Path
    version: QemuVersion

    @property
    def volume(self) -> str:
        return f"qemu-{self.version}"


@dataclass(frozen=True, slots=True)
class Run:
    """Of one fio job: requests a second in the guest, and what a reactor was busy for each, in ns."""

    iops: float
    mean_ns: float
    busy_ns: float


def hypervisors_of(programs: Sequence[Path]) -> list[Hypervisor]:
    """In the order given. InvalidError where it is fewer than two, or one version twice."""
    found = [Hypervisor(program, QemuVersion.of_program(program)) for program in programs]
    if len(found) < 2 or len({one.version for one in found}) < len(found):
        raise InvalidError("Give --qemu at least twice, each with another version of QEMU.")
    return found


def hypervisors(setting: Setting, results: Results, contenders: Sequence[Hypervisor], seconds: float) -> None:
    """A row for each shape and each QEMU but the first, which they are beside of."""
    image = ensure_guest_image(report=setting.progress)
    accelerator = choose_accelerator(image)
    results.notes.append(f"Guests run under {accelerator.name.upper()}, Linux {image.kernel_version}.")
    run, state = setting.directory / "run", setting.directory / "state"
    run.mkdir()
    state.mkdir()
    with ExitStack() as stack:
        daemon = stack.enter_context(GatewayDaemon(run, state, [setting.cores.server]))
        daemon.start()
        daemon.make_pool("memory", "memory", setting.directory / "memory")
        guests = []
        for one in contenders:
            setting.progress(f"QEMU {one.version}: boot and fill")
            socket = daemon.serve(one.volume, "memory", size=setting.size, queues=_CPUS)
            disk = Disk(str(socket), one.volume, _CPUS)
            folder = setting.directory / one.volume
            config = QemuConfig(image, accelerator.name, folder, [disk], cpus=_CPUS, program=one.program)
            guest = stack.enter_context(Guest(config))
            guest.fio(fill(setting.size))
            guests.append(guest)
        for shape in shapes(seconds, setting.size):
            turns = [
                partial(_run, shape, daemon, guest, one)
                for guest, one in zip(guests, contenders, strict=True)
            ]
            taken: list[list[Run]] = [[] for _ in turns]
            for turn, index, measured in interleave(setting.plan.rounds, turns):
                taken[index].append(measured)
                setting.progress(f"{shape.title}: round {turn + 1}/{setting.plan.rounds}")
            for one, runs in zip(contenders, taken, strict=True):
                results.keep_raw(
                    "guests", f"QEMU {one.version}", {"shape": shape.title}, [asdict(run) for run in runs]
                )
            for at in range(1, len(contenders)):
                results.rows.append(_row(shape, contenders, taken, at))


def _run(shape: Shape, daemon: GatewayDaemon, guest: Guest, one: Hypervisor) -> Run:
    with daemon.client() as client:
        before = client.stats(volume=one.volume)
        result = guest.fio(shape.job)
        after = client.stats(volume=one.volume)
    seen = result.read if shape.job.pattern == "randread" else result.write
    return Run(seen.iops, seen.mean_ns, (_busy(after, one) - _busy(before, one)) / max(seen.operations, 1))


def _busy(snapshot: Snapshot, one: Hypervisor) -> int:
    return sum(queue.busy_ns for queue in snapshot.of_volume(one.volume))


def _row(shape: Shape, contenders: Sequence[Hypervisor], taken: Sequence[Sequence[Run]], at: int) -> Row:
    """Of contender `at`, beside the one before it."""
    before, ours = taken[at - 1], taken[at]
    busy = [median(run.busy_ns for run in runs) for runs in (before, ours)]
    return Row.beside(
        f"QEMU {contenders[at].version} beside {contenders[at - 1].version}",
        shape.title,
        "IOPS",
        [run.iops for run in ours],
        (f"QEMU {contenders[at - 1].version}", [run.iops for run in before]),
        f"the guest; the reactor is busy {busy[0]:,.0f} ns and {busy[1]:,.0f} ns for each request",
        _BAR,
    )
