"""Ringstone as an administrator installs it, in a guest with systemd: a virtual environment at /opt/ringstone, the
units of deploy/, and a command line that is on the path. tests.framework.packages installs it from Debian packages."""

import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import ringstone
from ringstone.bench.reports import PatternReport
from ringstone.hypervisor.accelerator import choose_accelerator
from ringstone.hypervisor.debian_root import KERNEL_ARGUMENTS, disk_args, ensure_debian_root, make_image
from ringstone.hypervisor.guest import Command, Guest
from ringstone.hypervisor.guest_image import ensure_guest_image
from ringstone.hypervisor.qemu import QemuConfig

ROOT = Path(__file__).resolve().parents[2]
PLACE = "/opt/ringstone"
GATEWAY = "ringstone-gateway.service"
MANAGER = "ringstone-manager.service"
# What the guest's Debian has; compiled modules fit no other version.
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
_IMAGE_BYTES = 256 << 20
# An emulated CPU imports Python modules slowly.
_COMMAND_SECONDS = 180.0
_BOOT_SECONDS = 300.0

# These run in the guest.
_SERVE = """
import json, pathlib, sys
from ringstone.client import GatewayClient
from ringstone.models import PoolCreate

sockets = {}
with GatewayClient(pathlib.Path("/run/ringstone/gateway.sock")) as client:
    for name, options in json.loads(sys.argv[1]).items():
        client.create_pool(PoolCreate(name=name, **options))
        client.create_volume(name, pool=name, size=32 << 20)
        sockets[name] = client.attach(name, queues=2).socket
print(json.dumps(sockets))
"""
# The FIFO is written to when the load is to end.
_LOAD = """
import pathlib, sys
from ringstone.bench.pattern import running_pattern

with running_pattern(sys.argv[1], queues=2, depth=8, span_bytes=8 << 20, rate=200) as load:
    pathlib.Path("/run/load.ready").touch()
    pathlib.Path("/run/load.release").read_text()
print(load.report.model_dump_json())
"""


class Installed:
    """A guest in which both units are there. `guest` runs everything else; `python`: what Ringstone runs with there."""

    def __init__(self, guest: Guest, python: str = f"{PLACE}/bin/python") -> None:
        self.guest = guest
        self.python = python
        self._load: Command | None = None

    def install(self) -> None:
        """What an administrator does once."""
        self.shell(f"mkdir {PLACE} && mount -o ro /dev/disk/by-id/virtio-ringstone {PLACE}")
        self.shell(f"ln -s {PLACE}/bin/ringstone /usr/bin/ringstone && mkdir -p /etc/ringstone")
        self.shell(f"cp {PLACE}/deploy/*.service /etc/systemd/system/ && systemctl daemon-reload")

    def shell(self, command: str, *, check: bool = True, timeout_s: float = _COMMAND_SECONDS) -> str:
        """The command's standard output; with `check` it must end with 0."""
        return self.guest.run(command, timeout_s=timeout_s, check=check).stdout.strip()

    def ringstone(self, *arguments: str) -> Any:
        """What a command prints with --json."""
        return json.loads(self.shell(f"ringstone {' '.join(arguments)} --json"))

    def refusal(self, command: str) -> str:
        """The last line of what a command says that must fail."""
        ended = self.guest.run(command, timeout_s=_COMMAND_SECONDS, check=False)
        assert ended.exit_code != 0, f"`{command}` was not refused: {ended.stdout}"
        return (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1]

    def property(self, name: str, unit: str = GATEWAY) -> str:
        """A property of a unit, as `systemctl show` prints it."""
        return self.shell(f"systemctl show --property {name} --value {unit}")

    def drop_in(self, unit: str, *lines: str) -> None:
        """As `systemctl edit` does: further lines for the unit's [Service] section, from its next start on."""
        folder = f"/etc/systemd/system/{unit}.d"
        text = "\\n".join(("[Service]", *lines))
        self.shell(f"mkdir -p {folder} && printf '{text}\\n' >{folder}/test.conf && systemctl daemon-reload")

    def no_drop_in(self, unit: str) -> None:
        """The unit as it was installed, from its next start on."""
        self.shell(f"rm -rf /etc/systemd/system/{unit}.d && systemctl daemon-reload")

    def serve(self, pools: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """A volume in each of `pools` (what is asked for of each, by name), attached; the sockets by pool. One process
        does all of it, as an emulated CPU takes seconds to start a command."""
        said = self.shell(f"{self.python} - {shlex.quote(json.dumps(pools))} <<'END'\n{_SERVE}\nEND")
        sockets: dict[str, str] = json.loads(said)
        return sockets

    def verify(self, socket: str, **more: Any) -> dict[str, Any]:
        """A job of the independent client's, which compares every answer with a model of the volume."""
        job = {"mode": "verify", "socket": socket, "operations": 300, "queues": 1, **more}
        line = json.dumps({"call": "load", "config": job})
        said = self.shell(f"echo '{line}' | {self.python} -m ringstone.bench.client")
        answer: dict[str, Any] = json.loads(said.splitlines()[-1])
        assert "report" in answer, answer
        report: dict[str, Any] = answer["report"]
        return report

    def start_load(self, socket: str) -> None:
        """The independent client with a pattern in every block; returns when each queue has completed a request."""
        assert self._load is None, "one load at a time"
        self.shell("rm -f /run/load.* && mkfifo /run/load.release")
        script = f"{self.python} - {socket} <<'END'\n{_LOAD}\nEND\ntouch /run/load.ended"
        self._load = self.guest.start(f"({script})")
        self.shell("until [ -e /run/load.ready -o -e /run/load.ended ]; do sleep 0.1; done")

    def end_load(self) -> PatternReport:
        """Its report, every block read back."""
        load, self._load = self._load, None
        assert load is not None, "no load runs"
        self.shell("[ -e /run/load.ended ] || echo >/run/load.release")
        ended = load.wait(timeout_s=_COMMAND_SECONDS)
        assert ended.stdout, ended.stderr
        return PatternReport.model_validate_json(ended.stdout)

    @contextmanager
    def loaded(self, socket: str) -> Iterator[list[PatternReport]]:
        """A load that knows every block, from its first answers to the end of the `with` block; then its report."""
        self.start_load(socket)
        reports: list[PatternReport] = []
        try:
            yield reports
        finally:
            reports.append(self.end_load())

    def journal(self, unit: str = GATEWAY, *options: str) -> str:
        """What the unit's processes have said, by a line each."""
        return self.shell(f"journalctl --no-pager --output cat --unit {unit} {' '.join(options)}")


def sound(report: PatternReport) -> None:
    """The load found every block as it should be, and each request was answered once."""
    assert report.passed, report.findings
    assert report.errors == report.lost == report.doubled == report.stuck == 0
    assert report.blocks_checked == report.blocks_written > 0


@contextmanager
def installed(folder: Path, *, disks: Sequence[tuple[Path, str]] = ()) -> Iterator[Installed]:
    """A booted guest with Ringstone installed and no unit started; `disks` are raw files with their serial numbers."""
    product = folder / "ringstone.ext4"
    _product(folder / "product", product)
    devices = disk_args(product, "ringstone", read_only=True)
    for path, serial in disks:
        devices += disk_args(path, serial)
    with booted(SUITES[sys.version_info[:2]], folder / "guest", devices) as guest:
        system = Installed(guest)
        system.install()
        yield system


@contextmanager
def booted(suite: str, folder: Path, devices: Sequence[str]) -> Iterator[Guest]:
    """A guest with that Debian and systemd, and `devices` beside its disk."""
    root = ensure_debian_root(suite)
    image = ensure_guest_image()
    config = QemuConfig(
        image,
        choose_accelerator(image).name,
        folder,
        devices=[*root.devices(), *devices],
        memory_bytes=1 << 30,
        kernel_arguments=KERNEL_ARGUMENTS,
    )
    with Guest(config, boot_timeout_s=_BOOT_SECONDS) as guest:
        yield guest


def _product(folder: Path, image: Path) -> None:
    """The image of /opt/ringstone: what `pip install` makes of this checkout and its locked requirements."""
    modules = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    modules.mkdir(parents=True)
    for name in ("ringstone", *_requirements()):
        distribution = metadata.distribution(name)
        for path in distribution.files or ():
            source, target = Path(str(distribution.locate_file(path))), modules / path
            # Scripts lie outside of the modules' directory. A .pth would lead back to this checkout.
            if ".." not in path.parts and source.is_file() and source.suffix != ".pth":
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
    shutil.copytree(Path(ringstone.__file__).parent, modules / "ringstone")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to("/usr/bin/python3")
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    script = folder / "bin" / "ringstone"
    script.write_text(f"#!{PLACE}/bin/python -P\nfrom ringstone.cli import main\n\nmain()\n")
    script.chmod(0o755)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    make_image(folder, image, _IMAGE_BYTES)


def _requirements() -> list[str]:
    lock = (ROOT / "requirements.lock").read_text()
    return [line.partition("==")[0] for line in lock.splitlines() if "==" in line]
