"""One family of errors for the engine, the gateway, its API, the client and the CLI.

Each error has a stable word (`code`) that crosses the API, an HTTP status and a process exit code, and its
message is one sentence (or two) that ends with the next step. docs/cli.md lists the exit codes.
"""

import errno
import os
from typing import ClassVar


class RingstoneError(Exception):
    """Base of every error a person may see. Raised itself only for what has no better name."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    @property
    def message(self) -> str:
        return str(self)


class NotFoundError(RingstoneError):
    """No pool, volume or attachment of that name."""

    code = "not_found"
    http_status = 404
    exit_code = 3


class ExistsError(RingstoneError):
    """The name, path or socket is taken."""

    code = "exists"
    http_status = 409
    exit_code = 4


class BusyError(RingstoneError):
    """The thing is in use: attached, connected, or a pool that still has volumes."""

    code = "busy"
    http_status = 409
    exit_code = 4


class InvalidError(RingstoneError):
    """A value that can never be right, whatever the state: a bad name, size or option."""

    code = "invalid"
    http_status = 422
    exit_code = 5


class NoSpaceError(RingstoneError):
    """The pool, its filesystem or the host's memory has no room."""

    code = "no_space"
    http_status = 507
    exit_code = 6


class UnreachableError(RingstoneError):
    """The gateway does not answer, or etcd does not. `sent`: whether the request may have been done all the same."""

    sent = True
    code = "unreachable"
    http_status = 503
    exit_code = 7


class StoppedError(RingstoneError):
    """The engine is stopping or stopped."""

    code = "stopped"
    http_status = 503
    exit_code = 7


class GoneError(RingstoneError):
    """What was handed over has been lost on the way."""

    code = "gone"
    http_status = 500
    exit_code = 10


class NoDeviceError(RingstoneError):
    """A path, directory or block device that does not exist, or is not what it should be."""

    code = "no_device"
    http_status = 422
    exit_code = 8


class UnsupportedError(RingstoneError):
    """The kernel, filesystem or device cannot do what was asked."""

    code = "unsupported"
    http_status = 501
    exit_code = 9


class StorageError(RingstoneError):
    """A drive or filesystem answered with an error."""

    code = "io"
    http_status = 500
    exit_code = 10


class FailedError(RingstoneError):
    """The volume's backing is missing or damaged; the volume is in state `failed`."""

    code = "failed"
    http_status = 409
    exit_code = 11


class StateError(RingstoneError):
    """The state cannot be used: written by a newer version, damaged, or not the one that it was."""

    code = "state"
    http_status = 500
    exit_code = 12


class FencedError(RingstoneError):
    """The volume has another owner now, or none; this one must not touch it any more."""

    code = "fenced"
    http_status = 409
    exit_code = 13


class DeniedError(RingstoneError):
    """A cluster refuses the user or its key."""

    code = "denied"
    http_status = 403
    exit_code = 14


class UntrustedError(DeniedError):
    """A server is not proved to be who it should be, or there is no token for it. `sent`: as of UnreachableError; where
    this is found here, nothing was sent."""

    sent = False
    code = "untrusted"


class UnauthorizedError(RingstoneError):
    """The server wants a token, or does not know the one it was given."""

    code = "unauthorized"
    http_status = 401
    exit_code = 14


class ForbiddenError(RingstoneError):
    """The server knows the token, and its scope does not reach as far as the request."""

    code = "forbidden"
    http_status = 403
    exit_code = 14


_BY_CODE: dict[str, type[RingstoneError]] = {
    kind.code: kind
    for kind in (
        RingstoneError,
        NotFoundError,
        ExistsError,
        BusyError,
        InvalidError,
        NoSpaceError,
        UnreachableError,
        StoppedError,
        GoneError,
        NoDeviceError,
        UnsupportedError,
        StorageError,
        FailedError,
        StateError,
        FencedError,
        DeniedError,
        UntrustedError,
        UnauthorizedError,
        ForbiddenError,
    )
}

# The engine's word for a drive that another process has open. It means the same as busy for whoever asked.
_BY_CODE["in_use"] = BusyError

_BY_ERRNO: dict[int, type[RingstoneError]] = {
    errno.ENOENT: NoDeviceError,
    errno.ENODEV: NoDeviceError,
    errno.ENXIO: NoDeviceError,
    errno.ENOTDIR: NoDeviceError,
    errno.EEXIST: ExistsError,
    errno.EBUSY: BusyError,
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.ENOMEM: NoSpaceError,
    errno.EFBIG: InvalidError,
    errno.ENAMETOOLONG: InvalidError,
    errno.EOPNOTSUPP: UnsupportedError,
    errno.ENOSYS: UnsupportedError,
}


def error_of_code(code: str, message: str) -> RingstoneError:
    """The error that `code` (from the engine or over the API) names; an unknown word gives the base class."""
    return _BY_CODE.get(code, RingstoneError)(message)


# What a systemd unit forbids comes as these, and no permission or mount explains it.
_UNIT_ALLOWS: dict[int, str] = {
    errno.EROFS: "ReadWritePaths=",
    errno.EPERM: "DeviceAllow=",
}


def unit_remedy(number: int | None) -> str | None:
    """The next step where this process is a systemd service, whose unit may be what refused."""
    setting = _UNIT_ALLOWS.get(number or 0)
    if setting is None or "INVOCATION_ID" not in os.environ:
        return None
    return (
        f"The gateway's unit may not allow it; add the path to {setting} with `systemctl edit ringstone-gateway`, "
        "restart it, and see docs/operations/confinement.md."
    )


def error_of_os(error: OSError, doing: str, next_step: str) -> RingstoneError:
    """Translate `error`, met while `doing` ("creating /pool/a.raw"), into the family; `next_step` is a
    sentence."""
    kind = _BY_ERRNO.get(error.errno or 0, StorageError)
    next_step = unit_remedy(error.errno) or next_step
    return kind(f"{doing[:1].upper()}{doing[1:]} failed: {error.strerror or error}. {next_step}")
