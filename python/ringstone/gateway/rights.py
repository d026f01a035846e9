"""Who may connect to a volume's socket, beside the gateway's own user: as people say it, and as the kernel has it."""

import grp
import pwd
import re
from dataclasses import dataclass, replace
from typing import Self

from ringstone.errors import InvalidError
from ringstone.state.records import AttachmentRecord

PRIVATE = 0o600
"""Of a socket that is nobody's in particular."""
_OF_A_GROUP = 0o660
# Its owner may use it, and nobody but owner and group has any right. The other bits mean nothing for a socket.
_MODE = re.compile(r"0?6[0246]0")
_NUMBER = re.compile(r"[0-9]{1,10}")
# The last one says "leave it" to chown(2).
_LARGEST_ID = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class SocketIds:
    """None: the gateway's own."""

    owner: int | None = None
    group: int | None = None
    mode: int = PRIVATE


OUR_OWN = SocketIds()


@dataclass(frozen=True, slots=True)
class SocketRights:
    """A user, a group (names or numbers) and a mode (octal digits); what is None is left to somebody else to say."""

    owner: str | None = None
    group: str | None = None
    mode: str | None = None

    @classmethod
    def of(cls, record: AttachmentRecord) -> Self:
        """What was asked for when it was attached."""
        return cls(record.socket_owner, record.socket_group, record.socket_mode)

    def over(self, default: "SocketRights") -> "SocketRights":
        """With what `default` says where these say nothing."""
        return SocketRights(
            self.owner if self.owner is not None else default.owner,
            self.group if self.group is not None else default.group,
            self.mode if self.mode is not None else default.mode,
        )

    def ids(self) -> SocketIds:
        """As this host knows them. InvalidError names what is wrong. The mode of a group's socket is 0660, where none
        is said."""
        owner, group = _id("user", self.owner), _id("group", self.group)
        if self.mode is None:
            return SocketIds(owner, group, PRIVATE if group is None else _OF_A_GROUP)
        if _MODE.fullmatch(self.mode) is None:
            raise InvalidError(
                f"{self.mode!r} is no mode for a volume's socket: whoever may connect has all of its data, so only its "
                "owner and one group may. Write 0600, or 0660 with a group."
            )
        return SocketIds(owner, group, int(self.mode, 8))

    def on(self, record: AttachmentRecord) -> AttachmentRecord:
        """As they are asked for."""
        return replace(record, socket_owner=self.owner, socket_group=self.group, socket_mode=self.mode)

    def __str__(self) -> str:
        """For a person, such as "libvirt-qemu:kvm 0660"; "root" stands for whatever user the gateway has."""
        mode = self.mode or f"{PRIVATE if self.group is None else _OF_A_GROUP:o}"
        return f"{self.owner or 'root'}:{self.group or 'root'} {mode.rjust(4, '0')}"


UNSAID = SocketRights()


def _id(kind: str, name: str | None) -> int | None:
    if name is None:
        return None
    if _NUMBER.fullmatch(name):
        if int(name) > _LARGEST_ID:
            raise InvalidError(f"{name} is no {kind}'s number; the largest is {_LARGEST_ID}.")
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError) as error:
        raise InvalidError(
            f"There is no {kind} {name!r} on this host. Name one that `getent {'passwd' if kind == 'user' else kind}` "
            "shows, or give its number."
        ) from error
