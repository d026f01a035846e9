"""What a large store costs: opening it, and memory. And what an idle volume costs."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from ringstone import _engine
from ringstone.bench import store_drive
from ringstone.bench.gateway import EngineProcess
from ringstone.bench.process import resident_bytes
from ringstone.bench.results import Results, Row
from ringstone.bench.setting import Setting
from ringstone.bench.spread import Bar, Spread
from ringstone.bench.store_drive import StoreDrive

TIB = 1 << 40
MIB = 1 << 20
SMALL_MAPPED = 16 << 30
IDLE = 64
OPENING = Bar("at most 2 s for 1 TiB", at_most=2.0)
MEMORY = Bar("at most 160 MiB for each TiB", at_most=160.0)
IDLE_MEMORY = Bar("at most 64 KiB", at_most=64.0)


@dataclass(frozen=True, slots=True)
class Opened:
    """A store and its only volume, opened by a process that had none. Bytes are resident memory."""

    store_s: float
    volume_s: float
    store_bytes: int
    volume_bytes: int


def size(setting: Setting, results: Results) -> None:
    mapped = TIB if setting.size >= 1 << 30 else SMALL_MAPPED
    _mapped(mapped, setting, results)
    _idle(setting, results)


def _mapped(mapped: int, setting: Setting, results: Results) -> None:
    section = f"a store with {mapped / TIB:.3g} TiB mapped"
    path = setting.disk / "large"
    with ExitStack() as stack:
        stack.callback(path.unlink, missing_ok=True)
        with path.open("xb") as file:
            file.truncate(mapped + mapped // 10 + store_drive.OVERHEAD)
        with store_drive.started(setting, "large") as engine:
            engine.call("format_store", path=str(path))
            drive = StoreDrive(engine, path)
            drive.open()
            drive.create("volume", mapped)
            drive.close()
        setting.progress(f"mapping {mapped >> 30} GiB")
        _engine.map_without_data(str(path), "volume", mapped)
        rounds = [_open(path, mapped, setting, turn) for turn in range(setting.plan.rounds)]
    results.notes.append(
        f"Mapping {mapped >> 30} GiB: the store is on a sparse file; its own code wrote journal, table and catalog as "
        "for first writes of 4 MiB in order, and the guest's data was left out. So all extents are whole and lie in "
        "order, which is what most extents of a volume are."
    )
    results.keep_raw(section, "ringstone", {"mapped": mapped}, [asdict(one) for one in rounds])
    tib = mapped / TIB
    took = [one.store_s + one.volume_s for one in rounds]
    store_s = Spread.of([one.store_s for one in rounds]).median
    store = Spread.of([one.store_bytes / MIB / tib for one in rounds]).median
    results.rows += [
        Row.absolute(
            section,
            "opening the store and the volume",
            "s",
            Spread.of([each / tib for each in took]) if tib < 1 else Spread.of(took),
            OPENING,
            f"{store_s:.2f} s of it to read the table" + (", reckoned for 1 TiB" if tib < 1 else ""),
        ),
        Row.absolute(
            section,
            "resident memory",
            "MiB",
            Spread.of([(one.store_bytes + one.volume_bytes) / MIB / tib for one in rounds]),
            MEMORY,
            f"{store:.0f} MiB of it for the store, the rest for the volume's map",
        ),
    ]


def _open(path: Path, mapped: int, setting: Setting, turn: int) -> Opened:
    with store_drive.started(setting, f"large-{turn}") as engine:
        drive = StoreDrive(engine, path)
        before = resident_bytes(engine.pid)
        store_ns = drive.open()
        store = resident_bytes(engine.pid)
        _, volume_ns = engine.timed_call(
            "open", name="volume", backend=drive.backend("volume"), size=mapped, block_size=4096
        )
        volume = resident_bytes(engine.pid)
        setting.progress(f"opened in {store_ns / 1e9:.2f} s and {volume_ns / 1e9:.2f} s")
        engine.call("close", name="volume")
        drive.close()
    return Opened(store_ns / 1e9, volume_ns / 1e9, store - before, volume - store)


def _idle(setting: Setting, results: Results) -> None:
    section = f"{IDLE} idle volumes, open and empty"
    with store_drive.preallocated(setting, 64 * MIB, "idle") as drive:
        each: list[float] = []
        for turn in range(setting.plan.rounds):
            for number in range(IDLE):
                drive.create(f"idle-{turn}-{number}", 1 << 30)
            before = resident_bytes(drive.engine.pid)
            for number in range(IDLE):
                _open_idle(drive.engine, drive, f"idle-{turn}-{number}")
            each.append((resident_bytes(drive.engine.pid) - before) / IDLE / 1024)
            setting.progress(f"idle: round {turn + 1}/{setting.plan.rounds}: {each[-1]:.1f} KiB for each")
    results.keep_raw(section, "ringstone", {"volumes": IDLE}, [{"kib": one} for one in each])
    why = "without a frontend; its rings and buffers are those of every volume"
    results.rows.append(
        Row.absolute(section, "resident memory for each", "KiB", Spread.of(each), IDLE_MEMORY, why)
    )


def _open_idle(engine: EngineProcess, drive: StoreDrive, name: str) -> None:
    engine.call("open", name=name, backend=drive.backend(name), size=1 << 30, block_size=4096)
