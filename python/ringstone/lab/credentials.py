"""What hosts and managers of a lab know each other by: a certificate authority of its own, and tokens."""

import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path

from ringstone.lab.process import need, run

_DAYS = "2"
# The curve keeps this to milliseconds.
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
_NEW = ("openssl", "req", "-x509", *_CURVE, "-nodes")


@dataclass(frozen=True, slots=True)
class Certificate:
    cert: Path
    key: Path


class Credentials:
    """All in `folder`, which is made."""

    def __init__(self, folder: Path) -> None:
        need("openssl", "openssl")
        self._folder = folder
        folder.mkdir(mode=0o700)
        self.ca = folder / "ca.pem"
        self._ca_key = folder / "ca.key"
        # Without this, Python 3.13 believes no certificate of it.
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        own = ("-subj", "/CN=Ringstone lab", "-days", _DAYS, *usage)
        run([*_NEW, *own, "-keyout", str(self._ca_key), "-out", str(self.ca)])
        # For managers, shown by whoever uses them.
        self.token_file = folder / "token"
        self.token = _new_token(self.token_file)
        # For gateways, each in a file with its host's name, shown by managers.
        self.gateway_tokens = folder / "gateways"
        self.gateway_tokens.mkdir(mode=0o700)

    def certificate(self, *names: str, common_name: str | None = None) -> Certificate:
        """For a server or client with these addresses and names, signed by the authority."""
        stem = "-".join([*names, *([f"cn-{common_name}"] if common_name else [])])
        cert, key = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        if not cert.exists():
            # Without a common name, which etcd could take for a user. Left to itself, openssl would make an authority.
            subject = f"/CN={common_name}" if common_name else "/O=Ringstone lab"
            own = ("-subj", subject, "-addext", "basicConstraints=critical,CA:FALSE", "-days", _DAYS)
            alternatives = ",".join(f"{_kind(name)}:{name}" for name in names)
            by = ("-CA", str(self.ca), "-CAkey", str(self._ca_key), "-keyout", str(key), "-out", str(cert))
            run([*_NEW, *own, "-addext", f"subjectAltName={alternatives}", *by])
        return Certificate(cert, key)

    def secret(self, name: str) -> Path:
        """A new file with something that nobody guesses."""
        path = self._folder / name
        _new_token(path)
        return path

    def gateway_token(self, host: str) -> str:
        """The one that the gateway of `host` wants."""
        path = self.gateway_tokens / host
        return path.read_text().strip() if path.exists() else _new_token(path)

    def gateway_arguments(self, host: str, address: str, port: int) -> list[str]:
        """Flags of a gateway that is served at that address."""
        self.gateway_token(host)
        return self._server_arguments(address, port, self.gateway_tokens / host, host)

    def manager_arguments(self, address: str, port: int) -> list[str]:
        """Flags of a manager that is served at that address."""
        return [
            *self._server_arguments(address, port, self.token_file),
            *("--gateway-token-dir", str(self.gateway_tokens), "--gateway-ca", str(self.ca)),
        ]

    def _server_arguments(self, address: str, port: int, token_file: Path, *names: str) -> list[str]:
        certificate = self.certificate(address, *names)
        return [
            *("--listen", f"{address}:{port}", "--token-file", str(token_file)),
            *("--tls-cert", str(certificate.cert), "--tls-key", str(certificate.key)),
        ]


def _kind(name: str) -> str:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "DNS"
    return "IP"


def _new_token(path: Path) -> str:
    token = secrets.token_hex(32)
    path.touch(mode=0o600)
    path.write_text(f"{token}\n")
    return token
