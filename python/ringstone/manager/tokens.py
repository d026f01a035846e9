"""The tokens that a manager shows to gateways: one for all, one for each, or both."""

import stat
from dataclasses import dataclass
from pathlib import Path

from ringstone.errors import InvalidError, UntrustedError, error_of_os
from ringstone.listening import read_tokens
from ringstone.manager.trust import check_host


@dataclass(frozen=True, slots=True)
class GatewayTokens:
    """`directory`: a token file for each host, under its name. `file`: for hosts that have none there. Of a file, the
    first token is shown. Both are read each time, so that tokens are changed, and hosts added, without a restart."""

    file: Path | None
    directory: Path | None = None

    def check(self) -> None:
        """Errors of ringstone.errors when what is there is not what it should be."""
        if self.file is not None:
            read_tokens(self.file)
        if self.directory is None:
            return
        try:
            mode = stat.S_IMODE(self.directory.stat().st_mode)
            files = sorted(self.directory.iterdir())
        except OSError as error:
            step = "Correct gateway_token_dir, or the directory's permissions."
            raise error_of_os(error, f"reading {self.directory}", step) from error
        if mode & stat.S_IWOTH:
            raise InvalidError(
                f"Every user may put tokens into {self.directory}; run `chmod o= {self.directory}`, and make new "
                "tokens if the machine has other users."
            )
        for path in files:
            read_tokens(path)

    def of(self, host: str) -> str:
        """UntrustedError when there is none, or `host`, a name from etcd, is none that could be a file's."""
        return read_tokens(self.path(host))[0]

    def path(self, host: str) -> Path:
        """Where the token for `host` is read."""
        check_host(host)
        if self.directory is not None and ((own := self.directory / host).exists() or self.file is None):
            if not own.exists():
                raise UntrustedError(
                    f"The manager has no token for host {host!r}: there is no {own}. Put one of the tokens of that "
                    "gateway's token_file there, for its owner alone to read."
                )
            return own
        assert self.file is not None, "the configuration has one of both"
        return self.file
