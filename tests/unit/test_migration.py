"""The order of a migration's steps, and what is rolled back when one fails, with stand-ins for both QEMUs."""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from qemu.qmp import ExecuteError, Message, QMPError
from qemu.qmp.models import ErrorResponse

from ringstone import models
from ringstone.errors import BusyError, NotFoundError, UnreachableError
from ringstone.hypervisor import disks
from ringstone.hypervisor.disks import MovedDisks, SharedDisks
from ringstone.hypervisor.migration import MigrationError, migrate_vm
from ringstone.hypervisor.qmp import QmpEvent, QmpSession
from ringstone.hypervisor.versions import QemuVersion

URI = "unix:/move.sock"


def refusal(command: str) -> ExecuteError:
    """QEMU's answer to a command that it does not take."""
    error = {"class": "GenericError", "desc": f"{command} is refused"}
    return ExecuteError(ErrorResponse({"error": error}), Message(), Message())


@dataclass
class QemuStandIn:
    """One QEMU. `story`: all that happened to anybody, in order. `outcome`: how its migration ends; None is never."""

    name: str
    state: str
    story: list[str]
    outcome: str | None = "completed"
    migration: str = "none"
    gone: bool = False
    refuses: set[str] = field(default_factory=set)
    on_end: Callable[[], None] = lambda: None
    release: tuple[int, int] = (7, 2)
    kvm: bool = True
    memory: tuple[int, ...] = (256 << 20,)

    def version(self) -> QemuVersion:
        return QemuVersion(*self.release)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        if self.gone:
            raise QMPError("the session is closed")
        if command == "query-status":
            return {"status": self.state}
        if command == "query-migrate":
            return {"status": self.migration, "error-desc": "out of luck"}
        if command == "query-kvm":
            return {"present": True, "enabled": self.kvm}
        if command == "query-memory-size-summary":
            return {"base-memory": self.memory[0], "plugged-memory": sum(self.memory[1:])}
        if command == "query-memdev":
            return [{"id": f"memory{number}", "size": size} for number, size in enumerate(self.memory)]
        self.story.append(f"{self.name}: {command}")
        if command in self.refuses:
            raise refusal(command)
        if command in ("migrate", "migrate-incoming"):
            self.migration = "active"
        if command == "migrate_cancel":
            self.migration = self.outcome = "cancelled"
        if command == "cont":
            self.state = "running"
        if command == "quit":
            self.gone = True
            self.on_end()
        return {}

    def forget_events(self) -> None:
        pass

    def wait_event(self, names: Collection[str], *, timeout_s: float) -> QmpEvent:
        assert names == {"MIGRATION"}
        if self.outcome is None:
            raise TimeoutError
        self.migration = self.outcome
        if self.name == "source":
            self.state = {"completed": "postmigrate", "failed": "paused"}[self.outcome]
        return QmpEvent("MIGRATION", {"status": self.outcome})


@dataclass
class Host:
    story: list[str] = field(default_factory=list)
    frontends: int = 1
    to_host: str | None = None
    refuses: str = ""
    refuses_of: str = "v"
    attached: models.Attachment = field(
        default_factory=lambda: models.Attachment(
            volume="v",
            host="a",
            socket="/v.sock",
            queues=1,
            read_only=False,
            state="running",
            created_at=datetime.now(UTC),
        )
    )

    def __post_init__(self) -> None:
        self.source = QemuStandIn("source", "running", self.story, on_end=self.disconnect)
        self.destination = QemuStandIn("destination", "inmigrate", self.story, on_end=self.disconnect)

    def disconnect(self) -> None:
        self.frontends -= 1

    def share(self, volume: str, shared: bool) -> models.Attachment:
        if volume == "missing":
            raise NotFoundError("There is no volume 'missing'.")
        if not shared and self.frontends > 1:
            raise BusyError("two frontends are connected")
        self.story.append(f"{volume}: {'shared' if shared else 'exclusive'}")
        return cast(models.Attachment, None)

    def attachment(self, volume: str) -> models.Attachment:
        return self.attached

    def create_attachment(self, request: models.AttachmentCreate) -> models.Attachment:
        how = "incoming" if request.incoming else "take over" if request.take_over else "attach"
        self.story.append(f"{request.volume}: {how} on {request.host}")
        if (request.volume, f"{how} on {request.host}") == (self.refuses_of, self.refuses):
            raise UnreachableError("Ceph does not answer.")
        if request.take_over:
            self.attached = self.attached.model_copy(update={"host": request.host})
        return self.attached

    def release(self, volume: str) -> models.Attachment:
        self.story.append(f"{volume}: released")
        return self.attached

    def detach(self, volume: str, *, force: bool = False, host: str | None = None) -> None:
        self.story.append(f"{volume}: let go on {host}")

    def open_destination(self) -> Any:
        self.story.append("destination: connected")
        self.frontends += 1
        return nullcontext(self.destination)

    def migrate(self, *volumes: str, **options: Any) -> list[str]:
        names = volumes or ("v",)
        return migrate_vm(
            MovedDisks(self, names, self.to_host) if self.to_host else SharedDisks(self, names),
            source=cast(QmpSession, self.source),
            open_destination=self.open_destination,
            uri=URI,
            **options,
        )

    def failure(self, *volumes: str, **options: Any) -> str:
        with pytest.raises(MigrationError) as failure:
            self.migrate(*volumes, **options)
        return failure.value.message


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_DISCONNECT_SECONDS", 0.0)
    monkeypatch.setattr(disks, "_PAUSE_SECONDS", 0.0)


def test_the_steps_come_in_the_order_that_is_safe() -> None:
    host = Host()
    assert host.migrate("a", "b") == []
    assert host.story == [
        "a: shared",
        "b: shared",
        "destination: connected",
        "source: migrate-set-capabilities",
        "destination: migrate-set-capabilities",
        "destination: migrate-incoming",
        "source: migrate-set-parameters",
        "source: migrate",
        "source: quit",
        "a: exclusive",
        "b: exclusive",
    ]


class Killed(BaseException):
    """The command ends here: nothing is rolled back."""


class ShortStory(list[str]):
    """Ends the command when so many things have happened."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps: int | None = steps

    def append(self, step: str) -> None:
        super().append(step)
        if self.steps is not None and len(self) >= self.steps:
            raise Killed


@pytest.mark.parametrize("to_host", [None, "b"], ids=["shared", "moved"])
def test_a_command_that_is_killed_at_any_step_can_be_repeated(
    to_host: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the guest has left its source, and that is told."""
    whole = Host(to_host=to_host)
    whole.migrate()
    repeated = 0
    for steps in range(1, len(whole.story) + 1):
        story = ShortStory(steps)
        host = Host(story, to_host=to_host)
        with monkeypatch.context() as patched:
            patched.setattr("ringstone.hypervisor.migration._Move.roll_back", lambda move: None)
            with pytest.raises(Killed):
                host.migrate()
        story.steps = None
        # The command's connections are gone; QEMU itself goes on, and whoever repeats it starts a new destination.
        host.destination = QemuStandIn("destination", "inmigrate", story, on_end=host.disconnect)
        host.frontends = 1
        if host.source.gone:
            continue
        if host.source.migration != "none":
            host.source.wait_event({"MIGRATION"}, timeout_s=1)
            assert "in state postmigrate, not running" in host.failure()
            continue
        assert host.migrate() == []
        assert story[-1] == whole.story[-1]
        repeated += 1
    assert repeated > 3


def test_a_source_that_is_kept_leaves_the_volume_shared_and_says_so() -> None:
    host = Host()
    (left,) = host.migrate(keep_source=True)
    assert "`ringstone volume share v --off`" in left
    assert "source: quit" not in host.story
    assert "source: cont" not in host.story


def test_a_source_that_does_not_go_is_told() -> None:
    host = Host()
    host.source.on_end = lambda: None
    (left,) = host.migrate()
    assert "volume v still takes a second frontend (two frontends are connected)" in left


def test_a_guest_that_does_not_run_is_left_alone() -> None:
    host = Host()
    host.source.state = "paused"
    assert "state paused, not running. Rolled back: nothing had been changed." in host.failure()
    assert host.story == []


@pytest.mark.parametrize(
    ("version", "memory"),
    [((7, 2), (256 << 20,)), ((8, 2), (1 << 30,)), ((7, 2), ((256 << 20) + 8192, 128 << 20))],
)
def test_a_guest_whose_qemu_would_lose_its_memory_is_left_alone(
    version: tuple[int, int], memory: tuple[int, ...]
) -> None:
    host = Host()
    host.source.kvm, host.source.release, host.source.memory = False, version, memory
    failure = host.failure()
    assert f"QEMU {version[0]}.{version[1]} loses memory of an emulated guest" in failure
    assert "QEMU 9.0 or newer, or with 8 KiB more" in failure
    assert host.story == []


@pytest.mark.parametrize(
    ("kvm", "version", "memory"),
    [(True, (7, 2), 256 << 20), (False, (9, 0), 256 << 20), (False, (7, 2), (256 << 20) + 8192)],
)
def test_a_guest_whose_memory_is_followed_moves(kvm: bool, version: tuple[int, int], memory: int) -> None:
    host = Host()
    host.source.kvm, host.source.release, host.source.memory = kvm, version, (memory,)
    assert host.migrate() == []


def test_a_volume_that_cannot_be_shared_closes_the_others_again() -> None:
    host = Host()
    assert "no volume 'missing'. Rolled back: volume v is for one" in host.failure("v", "missing")
    assert host.story == ["v: shared", "v: exclusive"]


def test_a_destination_that_does_not_wait_for_a_guest_is_left_running() -> None:
    host = Host()
    host.destination.state = "running"
    message = host.failure()
    assert "start it with -incoming defer" in message
    assert "once the destination's QEMU has ended, run `ringstone volume share v --off`" in message
    assert host.story == ["v: shared", "destination: connected"]


def test_a_failed_migration_resumes_the_source_once_the_destination_is_gone() -> None:
    host = Host()
    host.source.outcome = "failed"
    message = host.failure()
    assert message.startswith("The migration failed: out of luck. Rolled back: the migration was stopped; ")
    assert host.story[-4:] == ["source: migrate", "destination: quit", "source: cont", "v: exclusive"]
    assert "the source was resumed; volume v is for one frontend again." in message


def test_one_that_takes_too_long_is_cancelled_and_the_source_runs_on() -> None:
    host = Host()
    host.source.outcome = None
    message = host.failure(timeout_s=1)
    assert "did not complete within 1 s" in message
    assert "the source runs on" in message
    assert host.story[-3:] == ["source: migrate_cancel", "destination: quit", "v: exclusive"]


@pytest.mark.parametrize("before", ["none", "completed"])
def test_a_refused_start_is_rolled_back(before: str) -> None:
    """Also where the guest came to this source by a migration, which QEMU still tells of as completed."""
    host = Host()
    host.source.migration = before
    host.source.refuses.add("migrate")
    assert "migrate is refused. Rolled back: the destination's QEMU was ended" in host.failure()
    assert host.story[-3:] == ["source: migrate", "destination: quit", "v: exclusive"]
    assert host.source.state == "running"


def test_a_guest_that_may_run_at_the_destination_is_never_resumed_at_the_source() -> None:
    host = Host()
    host.destination.outcome = "failed"
    message = host.failure()
    assert "nothing was rolled back, as the guest has left the source" in message
    assert host.story[-1] == "source: migrate"


def test_a_source_that_does_not_answer_is_for_a_person_to_look_at() -> None:
    host = Host()

    def lost(names: Collection[str], *, timeout_s: float) -> QmpEvent:
        host.source.gone = True
        raise EOFError("the source went away")

    host.source.wait_event = lost  # type: ignore[method-assign]
    assert "find out which QEMU runs the guest" in host.failure()
    assert host.story[-1] == "source: migrate"


def test_an_interrupted_migration_is_rolled_back_too() -> None:
    host = Host()

    def interrupted(names: Collection[str], *, timeout_s: float) -> QmpEvent:
        raise KeyboardInterrupt

    host.source.wait_event = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        host.migrate()
    assert host.story[-3:] == ["source: migrate_cancel", "destination: quit", "v: exclusive"]


def test_between_hosts_the_owner_changes_when_the_guest_has_come() -> None:
    host = Host(to_host="b")
    assert host.migrate() == []
    assert host.story == [
        "v: incoming on b",
        "destination: connected",
        "source: migrate-set-capabilities",
        "destination: migrate-set-capabilities",
        "destination: migrate-incoming",
        "source: migrate-set-parameters",
        "source: migrate",
        "v: released",
        "v: take over on b",
        "source: quit",
        "v: let go on a",
    ]


def test_a_guest_that_does_not_come_leaves_the_owner_as_it_was() -> None:
    host = Host(to_host="b")
    host.source.outcome = "failed"
    assert "the source was resumed; volume v is host a's as before" in host.failure()
    assert host.story[-3:] == ["destination: quit", "source: cont", "v: let go on b"]
    assert "v: released" not in host.story


def test_a_volume_that_does_not_follow_its_guest_is_for_a_person() -> None:
    host = Host(to_host="b", refuses="take over on b")
    message = host.failure()
    assert "waits, as that host could not take it over (Ceph does not answer)" in message
    assert "`ringstone volume attach v --host b --take-over`" in message
    assert "nothing was rolled back, as the guest has left the source" in message
    assert host.story[-1] == "v: take over on b"


def test_a_source_that_is_kept_leaves_its_host_listening_and_says_so() -> None:
    (left,) = Host(to_host="b").migrate(keep_source=True)
    assert "`ringstone volume detach v --host a`" in left


def test_a_guest_that_has_another_disk_already_is_not_sent_back() -> None:
    host = Host(to_host="b", refuses_of="w", refuses="take over on b")
    message = host.failure("v", "w")
    assert "`ringstone volume attach w --host b --take-over`" in message
    assert "resume the source" not in message.split("Rolled back")[0]
