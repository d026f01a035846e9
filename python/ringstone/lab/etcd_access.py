"""Who may use a lab's etcd: bearers of a certificate, and of them only a user whose role has Ringstone's keys."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringstone.lab.credentials import Certificate, Credentials
from ringstone.lab.etcd import EtcdCluster
from ringstone.lab.process import LabError
from ringstone.state.settings import DEFAULT_PREFIX

USER = "ringstone"


class EtcdAccess:
    """The members' certificate, the passwords of the users `root` and `ringstone`, and the latter's role.
    Everybody's certificates are of one authority and without a common name: etcd's JSON gateway refuses a client's that
    has one, and may take a member's for the login of whoever asks."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self.password_file = credentials.secret("etcd-password")
        self.root_password_file = credentials.secret("etcd-root-password")

    def certificates(self, addresses: Sequence[str]) -> dict[str, Path]:
        """For an EtcdCluster with members at `addresses`."""
        member = self._credentials.certificate(*addresses)
        return {"ca": self._credentials.ca, "cert": member.cert, "key": member.key}

    def require(self, cluster: EtcdCluster, prefix: str = DEFAULT_PREFIX) -> None:
        """From now on, of a cluster that was just started: a user for every call, and for `ringstone` no key outside
        `prefix`. docs/operations/cluster.md has the same in etcdctl's words."""
        assert prefix.endswith("/"), "etcd_prefix is checked for that"
        under = {"key": _encoded(prefix), "range_end": _encoded(prefix[:-1] + chr(ord("/") + 1))}
        steps: list[tuple[str, dict[str, Any]]] = [
            ("user/add", {"name": "root", "password": self.root_password_file.read_text().strip()}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("user/add", {"name": USER, "password": self.password_file.read_text().strip()}),
            ("role/add", {"name": USER}),
            ("role/grant", {"name": USER, "perm": {"permType": "READWRITE", **under}}),
            ("user/grant", {"user": USER, "role": USER}),
            ("enable", {}),
        ]
        cluster.wait_for_leader()
        with cluster.client() as client:
            for path, body in steps:
                answer = client.post(f"{cluster.endpoint(0)}/v3/auth/{path}", json=body)
                if not answer.is_success:
                    raise LabError(f"etcd refuses {path}: {answer.text}")
        cluster.login = ("root", self.root_password_file.read_text().strip())

    def arguments(self, cluster: EtcdCluster, certificate: Certificate) -> list[str]:
        """Flags of a gateway or a manager that has `certificate`."""
        return [
            *("--etcd", ",".join(cluster.endpoints), "--etcd-ca", str(self._credentials.ca)),
            *("--etcd-cert", str(certificate.cert), "--etcd-key", str(certificate.key)),
            *("--etcd-user", USER, "--etcd-password-file", str(self.password_file)),
        ]

    def environment(self, cluster: EtcdCluster) -> dict[str, str]:
        """With which etcdctl may do everything, beside ETCDCTL_USER: `root:` and the password."""
        member = self.certificates([one.address for one in cluster.members])
        return {
            "ETCDCTL_API": "3",
            "ETCDCTL_ENDPOINTS": ",".join(cluster.endpoints),
            "ETCDCTL_CACERT": str(member["ca"]),
            "ETCDCTL_CERT": str(member["cert"]),
            "ETCDCTL_KEY": str(member["key"]),
        }


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
