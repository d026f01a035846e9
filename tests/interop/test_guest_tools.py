"""The guest and its tools themselves: what the other tests rely on must be able to fail."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from ringstone.hypervisor import guest_image
from ringstone.hypervisor.fio import FioJob
from ringstone.hypervisor.guest import CommandFailed, Guest, GuestError
from tests.framework.gateway import GatewayProcess
from tests.framework.guest import GuestHost

MIB = 1 << 20
JOB = FioJob("verify", "randwrite", size=2 * MIB, verify="write")


@pytest.fixture(scope="module")
def guest(guest_host: GuestHost) -> Iterator[Guest]:
    with GatewayProcess() as gateway:
        gateway.start()
        gateway.serve("disk", kind="memory", size=64 * MIB)
        with guest_host.boot(gateway, "disk") as booted:
            yield booted


def test_a_second_image_costs_no_network_and_no_building(
    guest_host: GuestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_may_run(*_: object, **__: object) -> str:
        raise AssertionError("a program was started")

    monkeypatch.setattr(guest_image, "run_tool", nothing_may_run)
    assert guest_image.ensure_guest_image() == guest_host.image


def test_exit_codes_and_both_outputs_come_back(guest: Guest) -> None:
    result = guest.run("echo said; echo complained >&2; exit 7", check=False)
    assert (result.exit_code, result.stdout, result.stderr) == (7, "said\n", "complained\n")
    with pytest.raises(CommandFailed, match="exit code 7"):
        guest.run("exit 7")


def test_commands_run_beside_each_other(guest: Guest) -> None:
    waiting = guest.start("mkfifo /run/meeting && read -r word </run/meeting && echo $word")
    guest.run("until [ -p /run/meeting ]; do :; done; echo hello >/run/meeting")
    assert waiting.wait().stdout == "hello\n"


def test_a_large_output_is_whole(guest: Guest) -> None:
    assert guest.run("seq 200000").stdout == "".join(f"{number}\n" for number in range(1, 200001))


def test_verification_after_a_reboot_finds_one_spoiled_block(guest: Guest) -> None:
    guest.fio(JOB)
    guest.reboot()
    again = replace(JOB, verify="only")
    assert guest.fio(again).read.operations == 2 * MIB // 4096
    guest.run("dd if=/dev/zero of=/dev/vda bs=4096 seek=77 count=1 oflag=direct")
    with pytest.raises(CommandFailed, match="verify: bad"):
        guest.fio(again)


def test_a_fio_that_does_nothing_is_a_failure(guest: Guest) -> None:
    """fio refuses a mounted disk with a message and exit code 0, and looked as if it had verified everything."""
    guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt")
    with pytest.raises(CommandFailed, match="mounted"):
        guest.fio(replace(JOB, verify="only"))
    guest.run("umount /mnt")


def test_a_guest_that_panics_is_told_from_one_that_works(guest: Guest) -> None:
    with pytest.raises(GuestError, match="restarted by itself") as error:
        guest.run("echo c >/proc/sysrq-trigger")
    assert "Kernel panic - not syncing: sysrq triggered crash" in str(error.value)
