"""Who may connect to a volume's socket: as it is asked for, and what the engine is told."""

import grp
import os
import pwd
import stat
from pathlib import Path

import pytest

from ringstone.errors import InvalidError
from ringstone.gateway.rights import OUR_OWN, SocketIds, SocketRights
from ringstone.gateway.sockets import Sockets
from ringstone.manager.failover import request_of
from ringstone.state import AttachmentRecord
from tests.framework.service import Host
from tests.framework.service import host as host

MIB = 1 << 20
USER, GROUP = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())


@pytest.mark.parametrize(
    ("rights", "ids"),
    [
        (SocketRights(), OUR_OWN),
        (SocketRights(USER.pw_name, GROUP.gr_name), SocketIds(USER.pw_uid, GROUP.gr_gid, 0o660)),
        (SocketRights("64055", "4294967294", "600"), SocketIds(64055, (1 << 32) - 2, 0o600)),
        (SocketRights(mode="0660"), SocketIds(mode=0o660)),
        (SocketRights("0"), SocketIds(0, None, 0o600)),
    ],
)
def test_names_and_numbers_are_understood(rights: SocketRights, ids: SocketIds) -> None:
    assert rights.ids() == ids


@pytest.mark.parametrize(
    ("rights", "message"),
    [
        (SocketRights("nobody-of-that-name"), "no user 'nobody-of-that-name' on this host.*getent passwd"),
        (SocketRights(group="no-such-group"), "no group 'no-such-group' on this host.*getent group"),
        (SocketRights(""), "no user ''"),
        (SocketRights("a\0b"), "no user"),
        (SocketRights("-1"), "no user '-1'"),
        (SocketRights("4294967295"), "no user's number"),
        (SocketRights(mode="0666"), "only its owner and one group may"),
        (SocketRights(mode="4660"), "no mode"),
        (SocketRights(mode="0060"), "no mode"),
        (SocketRights(mode="rw-rw----"), "no mode"),
    ],
)
def test_what_cannot_be_is_refused(rights: SocketRights, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        rights.ids()


def test_an_attachment_says_what_is_other_than_the_gateways() -> None:
    default = SocketRights("libvirt-qemu", "kvm")
    assert SocketRights(mode="0600").over(default) == SocketRights("libvirt-qemu", "kvm", "0600")
    assert SocketRights("me", "us").over(default) == SocketRights("me", "us")
    assert [str(one) for one in (SocketRights(), default, SocketRights("me", mode="600"))] == [
        "root:root 0600",
        "libvirt-qemu:kvm 0660",
        "me:root 0600",
    ]


def test_the_directory_of_the_sockets_is_to_be_entered_by_others_whatever_the_umask_is(
    tmp_path: Path,
) -> None:
    """QEMU's user could not reach its socket where the gateway was started with a strict umask."""
    before = os.umask(0o077)
    try:
        Sockets(tmp_path / "vhost", ()).prepare(tmp_path / "vhost/v.sock")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "vhost").stat().st_mode) == 0o755


def test_the_engine_is_told_at_every_start(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    record = host.service.attach("v", rights=SocketRights("64055", mode="0660"))
    assert (record.socket_owner, record.socket_group, record.socket_mode) == ("64055", None, "0660")
    host.crash_and_restart()
    assert host.engine.rights == {"v": SocketIds(64055, None, 0o660)}
    assert host.store.attachment("v") == record


def test_a_refused_user_leaves_nothing(host: Host) -> None:
    host.pool()
    host.service.volumes.create("v", "p", MIB, 512)
    with pytest.raises(InvalidError, match="no user 'nobody-there'"):
        host.service.attach("v", rights=SocketRights("nobody-there"))
    assert (host.store.attachments(), host.engine.rights, host.engine.volumes()) == ([], {}, [])
    assert host.store.volume("v").epoch == 0


def test_a_user_that_is_gone_fails_its_volume_and_no_other(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.pool()
    for name in ("v", "w"):
        host.service.volumes.create(name, "p", MIB, 512)
    host.service.attach("v", rights=SocketRights(USER.pw_name))
    host.service.attach("w")

    def gone(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr("pwd.getpwnam", gone)
    host.crash_and_restart()
    assert "no user" in (host.service.attachment_failure("v") or "")
    assert [one.volume for one in host.engine.attachments()] == ["w"]
    # Nothing was opened in vain.
    assert [volume.name for volume in host.engine.volumes()] == ["w"]


def test_whoever_takes_a_volume_over_gives_its_socket_to_the_same() -> None:
    held = AttachmentRecord(
        "v", "/run/ringstone/vhost/v.sock", 1, False, 1, "a", 1, True, {}, "qemu", "kvm", "0660"
    )
    request = request_of(held)
    assert (request.socket_owner, request.socket_group, request.socket_mode) == ("qemu", "kvm", "0660")
