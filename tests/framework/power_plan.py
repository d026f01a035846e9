"""What a store goes through until the power goes, and what it may hold then.

A plan has rounds. In each a snapshot or two come and go, and then requests are made of every volume, none of which
touches what another one of the round does, and flushed. So if power goes in round N, what rounds before it made is
there, and each sector that it writes is old or new.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.framework.scripts import SECTOR, content, write

SIZE = 1 << 20
VOLUMES = {"plain": False, "sealed": True}
MOST_REQUESTS = 10
MOST_SNAPSHOTS = 3
_LENGTHS = (SECTOR, 3 * SECTOR, 4096, 4096, 3 * 4096, 16384, 65536)
_KINDS = ("write", "write", "write", "write", "discard", "write_zeroes")


@dataclass(frozen=True)
class Life:
    """Of a snapshot: in which round it was made and deleted, and what it holds."""

    made: int
    content: bytes
    deleted: int | None = None

    def must_be(self, durable: int) -> bool:
        """Whether it is there when rounds up to `durable` are, and the next may have begun."""
        return self.made <= durable and (self.deleted is None or self.deleted > durable + 1)

    def may_be(self, durable: int) -> bool:
        return self.made <= durable + 1 and (self.deleted is None or self.deleted > durable)


@dataclass
class Plan:
    """`rounds`: as tests.framework.power_guest takes them. `contents`: of each volume, before the first round and
    behind each."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    contents: dict[str, list[bytes]] = field(
        default_factory=lambda: {name: [bytes(SIZE)] for name in VOLUMES}
    )
    snapshots: dict[tuple[str, str], Life] = field(default_factory=dict)

    @classmethod
    def make(cls, chance: Random, rounds: int) -> "Plan":
        plan = cls()
        for number in range(rounds):
            commands = plan._commands(chance, number)
            requests = {name: plan._requests(chance, name) for name in VOLUMES}
            plan.rounds.append({"commands": commands, "requests": requests})
        return plan

    def of_guest(self) -> dict[str, Any]:
        volumes = {name: {"size": SIZE, "integrity": integrity} for name, integrity in VOLUMES.items()}
        return {"volumes": volumes, "rounds": self.rounds}

    def _commands(self, chance: Random, number: int) -> list[dict[str, Any]]:
        commands: list[dict[str, Any]] = []
        live = [key for key, life in self.snapshots.items() if life.deleted is None]
        if live and (len(live) > MOST_SNAPSHOTS or chance.random() < 0.2):
            volume, name = key = chance.choice(live)
            life = self.snapshots[key]
            self.snapshots[key] = Life(life.made, life.content, number)
            commands.append({"op": "delete_snapshot", "volume": volume, "name": name})
        if chance.random() < 0.4:
            volumes = chance.sample(sorted(VOLUMES), chance.randint(1, len(VOLUMES)))
            name = f"s{number}"
            for volume in volumes:
                self.snapshots[volume, name] = Life(number, self.contents[volume][-1])
            commands.append({"op": "snapshot", "volumes": volumes, "name": name})
        return commands

    def _requests(self, chance: Random, volume: str) -> list[dict[str, Any]]:
        held = bytearray(self.contents[volume][-1])
        touched: list[tuple[int, int]] = []
        requests: list[dict[str, Any]] = []
        for _ in range(chance.randint(1, MOST_REQUESTS)):
            length = chance.choice(_LENGTHS)
            offset = chance.randrange(
                0, SIZE - length + 1, min(length, 4096) if chance.random() < 0.8 else SECTOR
            )
            if any(offset < end and begin < offset + length for begin, end in touched):
                continue
            touched.append((offset, offset + length))
            kind = chance.choice(_KINDS)
            new = content(chance.getrandbits(32), length) if kind == "write" else bytes(length)
            held[offset : offset + length] = new
            span = {"op": kind, "offset": offset, "len": length}
            requests.append(write(offset, new) if kind == "write" else span)
        self.contents[volume].append(bytes(held))
        return requests

    def states(self, volume: str, durable: int) -> tuple[bytes, bytes]:
        """What each sector of `volume` may be when rounds up to `durable` are, and the next may have begun."""
        contents = self.contents[volume]
        return contents[durable + 1], contents[min(durable + 2, len(self.rounds))]
