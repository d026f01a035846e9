"""A store whose drive fails: guests get errors and never wrong data, other pools go on, an event says what was. What
was acknowledged is there once the drive is well and the gateway was started anew."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringstone.errors import RingstoneError
from ringstone.models import PoolCreate, StoreOptions
from ringstone.pools import store_door
from ringstone.pools.store_format import BLOCK, Superblock, decode_superblock
from tests.framework.faulty_drive import READ, SYNC, WRITE, FaultyDirectory
from tests.framework.gateway import GatewayProcess
from tests.framework.load import verify
from tests.framework.scripts import Scripts, content, read, write

MIB = 1 << 20
DRIVE = 32 * MIB
SIZE = 4 * MIB
OLD, NEW = content(1, BLOCK), content(2, BLOCK)
FLUSH = {"op": "flush"}
# Somewhere that no test has written before.
FRESH = 3 * MIB


@dataclass
class Stored:
    """A store with volume `disk`, of which blocks of the first 2 MiB are written, on a drive that fails as it is told;
    and a volume `other` in a pool in memory."""

    gateway: GatewayProcess
    drive: FaultyDirectory
    scripts: Scripts
    integrity: bool

    @property
    def path(self) -> Path:
        return self.drive.path / "drive"

    def make(self) -> None:
        store = StoreOptions(size=DRIVE)
        with self.gateway.client() as client:
            client.create_pool(PoolCreate(name="fast", type="store", path=str(self.path), store=store))
            client.create_volume("disk", pool="fast", size=SIZE, integrity=self.integrity)
            client.attach("disk")
        self.gateway.serve("other", kind="memory", size=SIZE)
        self.ask(*[write(at, OLD) for at in range(0, 2 * MIB, 64 * BLOCK)], FLUSH)

    def socket(self, volume: str = "disk") -> str:
        with self.gateway.client() as client:
            return client.attachment(volume).socket

    def ask(self, *operations: dict[str, Any]) -> list[dict[str, Any]]:
        return self.scripts.run(self.socket(), list(operations))

    def statuses(self, *operations: dict[str, Any]) -> list[str]:
        return [one["status"] for one in self.scripts.results(self.socket(), list(operations))]

    def block(self, at: int) -> bytes:
        return bytes.fromhex(self.ask(read(at, BLOCK))[0]["text"])

    def superblock(self) -> Superblock:
        with self.path.open("rb") as file:
            found = []
            for place in (0, 512 << 10):
                file.seek(place)
                found.append(decode_superblock(file.read(BLOCK)))
        return max(found, key=lambda one: one.generation)

    def journal(self) -> tuple[int, int]:
        found = self.superblock()
        return found.journal_at, found.journal_at + found.journal_blocks * BLOCK

    def blocks(self) -> tuple[int, int]:
        return self.superblock().zones[0].data, DRIVE

    def messages(self) -> list[str]:
        with self.gateway.client() as client:
            return [event.message for event in client.events(limit=100)]

    def says(self, *parts: str) -> bool:
        return any(all(part in message for part in parts) for message in self.messages())

    def others_go_on(self) -> bool:
        return bool(verify(self.socket("other"), operations=100)["passed"])

    def begin_anew(self, *, killed: bool = False) -> None:
        """Of the gateway, with the store walked through between."""
        if killed:
            self.gateway.kill()
            self.gateway.forget_starts()
        else:
            self.gateway.stop()
        assert store_door.check(str(self.path)).faults == ()
        self.gateway.start()

    def is_whole(self) -> None:
        """What was acknowledged before all faults is there, and everything works."""
        assert all(self.block(at) == OLD for at in range(0, 2 * MIB, 64 * BLOCK))
        with self.gateway.client() as client:
            client.create_snapshot("disk", "afterwards")
            client.delete_snapshot("disk", "afterwards")
        assert verify(self.socket(), operations=200)["passed"]


PLAIN, INTEGRITY = "plain", "integrity"
BOTH = pytest.mark.parametrize("stored", [PLAIN, INTEGRITY], indirect=True)


@pytest.fixture(params=[PLAIN])
def stored(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stored]:
    with ExitStack() as stack:
        drive = stack.enter_context(FaultyDirectory(tmp_path))
        gateway = stack.enter_context(GatewayProcess()).start()
        scripts = stack.enter_context(Scripts(tmp_path / "client.log"))
        made = Stored(gateway, drive, scripts, request.param == INTEGRITY)
        made.make()
        # Before the gateway goes, which is to leave in order.
        stack.callback(drive.heal)
        yield made


@pytest.mark.parametrize(("stored", "killed"), [(PLAIN, False), (INTEGRITY, True)], indirect=["stored"])
def test_a_journal_that_cannot_be_written_is_told(stored: Stored, killed: bool) -> None:
    """Nothing is changed from then on, as nobody knows what of the journal is on the drive."""
    stored.drive.fail(WRITE, *stored.journal())
    assert stored.statuses(write(FRESH, NEW)) == ["ioerr"]
    assert stored.says("the journal could not be written", "Input/output error")
    stored.drive.heal()
    # In place too.
    assert (
        stored.statuses(write(0, NEW), write(FRESH, NEW), {"op": "discard", "offset": 0, "len": BLOCK})
        == ["ioerr"] * 3
    )
    assert stored.block(0) == OLD
    with (
        stored.gateway.client() as client,
        pytest.raises(RingstoneError, match="journal could not be written"),
    ):
        client.create_snapshot("disk", "monday")
    assert stored.others_go_on()
    stored.begin_anew(killed=killed)
    assert stored.block(FRESH) in (bytes(BLOCK), NEW)
    stored.is_whole()


@BOTH
def test_a_block_that_cannot_be_written_is_as_it_was(stored: Stored) -> None:
    """Of a block with a checksum the journal has said before what it will be. Once a flush had said that this was
    durable, a start took the block that was still there for a rotten one."""
    before = stored.drive.met()
    stored.drive.fail(WRITE, *stored.blocks())
    assert stored.statuses(write(0, NEW), write(FRESH, NEW)) == ["ioerr", "ioerr"]
    assert stored.says("Write of 4096 bytes", "failed: Input/output error")
    assert stored.drive.met() > before
    stored.drive.heal()
    assert [stored.block(0), stored.block(FRESH)] == [OLD, bytes(BLOCK)]
    # Without a restart.
    stored.ask(write(FRESH, NEW), write(64 * BLOCK, NEW), FLUSH)
    assert [stored.block(FRESH), stored.block(64 * BLOCK)] == [NEW, NEW]
    stored.ask(write(64 * BLOCK, OLD))
    stored.begin_anew(killed=True)
    assert stored.block(FRESH) == NEW
    stored.is_whole()


@BOTH
def test_a_block_that_cannot_be_read_is_an_error(stored: Stored) -> None:
    stored.drive.fail(READ, *stored.blocks())
    assert stored.statuses(read(0, BLOCK), read(FRESH, BLOCK), read(512, 512)) == ["ioerr", "ok", "ioerr"]
    assert stored.says("Read of 4096 bytes", "failed: Input/output error")
    # A part of a block needs the rest.
    assert stored.statuses(write(512, NEW[:512])) == (["ioerr"] if stored.integrity else ["ok"])
    assert stored.others_go_on()
    stored.drive.heal()
    stored.ask(write(0, OLD))
    stored.is_whole()


def test_a_flush_that_fails_is_not_answered_as_done(stored: Stored) -> None:
    stored.ask(write(FRESH, NEW))
    stored.drive.fail(SYNC)
    assert stored.statuses(FLUSH) == ["ioerr"]
    stored.drive.heal()
    stored.ask(FLUSH)
    stored.begin_anew(killed=True)
    assert stored.block(FRESH) == NEW
    stored.is_whole()


@pytest.mark.parametrize("part", ["table", "superblock"])
def test_a_checkpoint_that_fails_costs_nothing(stored: Stored, part: str) -> None:
    """A gateway that is told to stop has one written. It waited for that for ever."""
    found = stored.superblock()
    begin, end = (0, MIB) if part == "superblock" else (found.zones[0].table, found.zones[0].data)
    stored.ask(write(FRESH, NEW))
    stored.drive.fail(WRITE, begin, end)
    stored.gateway.stop()
    assert stored.drive.met() > 0
    stored.drive.heal()
    assert store_door.check(str(stored.path)).faults == ()
    stored.gateway.start()
    assert stored.block(FRESH) == NEW
    stored.is_whole()


def test_a_drive_that_is_pulled_out_stops_its_pool_alone(stored: Stored) -> None:
    stored.ask(write(FRESH, NEW), FLUSH)
    with stored.drive.gone():
        assert stored.statuses(read(0, BLOCK), write(0, OLD), FLUSH) == ["ioerr"] * 3
        assert stored.statuses(write(2 * MIB, NEW)) == ["ioerr"]
        assert stored.others_go_on()
        with stored.gateway.client() as client:
            assert client.pool("fast").state == "failed"
            assert {volume.name for volume in client.volumes()} == {"disk", "other"}
        # Nor may it keep the gateway from leaving and coming back.
        stored.gateway.restart()
        with stored.gateway.client() as client:
            assert client.pool("fast").state == "failed"
            assert client.attachment("disk").state == "failed"
        assert stored.others_go_on()
    stored.begin_anew()
    assert stored.block(FRESH) == NEW
    stored.is_whole()


def test_a_drive_that_does_not_answer_is_waited_for_by_its_guests_alone(stored: Stored) -> None:
    """The kernel does direct I/O on FUSE while whoever asked for it waits, with io_uring too. That stopped a reactor,
    and everyone on it."""
    with stored.drive.held():
        before = stored.drive.met()
        started = stored.scripts.start(stored.socket(), [write(0, NEW), write(FRESH, NEW), FLUSH])
        stored.gateway.wait_for("the drive to be asked", lambda _: stored.drive.met() > before)
        assert stored.others_go_on()
        with stored.gateway.client() as client:
            assert client.attachment("disk").state == "running"
    assert [one["status"] for one in started()] == ["ok"] * 3
    assert [stored.block(0), stored.block(FRESH)] == [NEW, NEW]
    stored.ask(write(0, OLD))
    stored.is_whole()
