"""Where the sockets of volumes may be, and who may connect to them."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ringstone.errors import InvalidError, error_of_os, unit_remedy
from ringstone.gateway import checks
from ringstone.gateway.rights import UNSAID, SocketIds, SocketRights
from ringstone.state.records import AttachmentRecord


class Sockets:
    """Whoever may attach a volume chooses where its socket is, and the gateway may be root: so the directories are the
    operator's choice, `socket_dirs` of the configuration, and the usual one. `rights`: who may connect, as far as an
    attachment does not say it."""

    def __init__(self, usual: Path, others: Sequence[Path], rights: SocketRights = UNSAID) -> None:
        self._usual = usual
        self._others = tuple(others)
        self._rights = rights

    def rights(self, record: AttachmentRecord) -> SocketRights:
        """Who may connect to the socket of an attachment on this host."""
        return SocketRights.of(record).over(self._rights)

    def ids(self, record: AttachmentRecord) -> SocketIds:
        """Looked up anew for each socket that is made; InvalidError when this host does not know the names (any
        more)."""
        return self.rights(record).ids()

    def place(self, volume: str, wanted: str | None) -> Path:
        """The socket's path: the usual one, or what is `wanted`. InvalidError where that may not be. A restart and a
        successor serve a volume where it was attached once, whatever the configuration says then."""
        path = self._usual / f"{volume}.sock" if wanted is None else Path(wanted)
        checks.check_socket(path)
        # As the kernel would go, so that neither a link nor `..` leads out.
        parent = Path(os.path.realpath(path.parent))
        if path.name in ("", "..") or not any(
            parent.is_relative_to(os.path.realpath(allowed)) for allowed in (self._usual, *self._others)
        ):
            others = "".join(f", {directory}" for directory in self._others)
            raise InvalidError(
                f"A socket at {path} is not allowed here, only below {self._usual}{others}. Choose another place, or "
                "none, or add the directory to `socket_dirs` of the gateway's configuration and upgrade it."
            )
        return path

    def prepare(self, path: Path) -> None:
        """Make the socket's directory if it is the usual one; InvalidError where another cannot be used."""
        if path.parent != self._usual:
            if not path.parent.is_dir():
                raise InvalidError(
                    f"The directory of the socket {path} does not exist; create it or choose another."
                )
            if not os.access(path.parent, os.W_OK | os.X_OK):
                remedy = unit_remedy(errno.EROFS) or "Check its permissions, or choose another."
                raise InvalidError(f"The directory of the socket {path} is not writable. {remedy}")
            return
        try:
            if not self._usual.exists():
                self._usual.mkdir(mode=0o755, parents=True, exist_ok=True)
                # Whatever the umask leaves: others are kept out by the sockets' own rights.
                self._usual.chmod(0o755)
        except OSError as error:
            raise error_of_os(error, f"making {self._usual}", "Check the run directory.") from error
