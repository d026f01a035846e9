"""`ringstone lab`"""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringstone.cli.context import JsonOption, context_of, print_json
from ringstone.cli.progress import RichProgress
from ringstone.stopping import Stopping

if TYPE_CHECKING:
    from ringstone.lab.lab import Lab

_NAMES = "abcdefgh"


def lab(
    context: typer.Context,
    hosts: Annotated[int, typer.Option(min=1, max=len(_NAMES), help="How many hosts with a gateway.")] = 2,
    osds: Annotated[int, typer.Option(min=1, max=9, help="How many OSDs Ceph has.")] = 3,
    copies: Annotated[int, typer.Option(min=1, max=9, help="How many copies Ceph keeps of each block.")] = 3,
    etcd_members: Annotated[int, typer.Option(min=1, max=5, help="How many members etcd has.")] = 1,
    managers: Annotated[int, typer.Option(min=0, max=5, help="How many managers.")] = 1,
    json_output: JsonOption = False,
) -> None:
    """Start a cluster on this machine (Ceph, etcd, managers, hosts as network namespaces), say how to talk to it, and
    stop it all at Ctrl-C or SIGTERM.

    Takes root, and Debian's packages of Ceph and etcd (make lab-packages). It is for trying and testing: all data are
    in memory and gone at the end.
    """
    from ringstone.lab.ceph_conf import CephSettings
    from ringstone.lab.lab import Lab, LabSettings

    if copies > osds:
        raise typer.BadParameter(
            "Each copy needs an OSD of its own; give at most --osds.", param_hint="--copies"
        )
    as_json = context_of(context, json_output).json
    ceph = CephSettings(osds=osds, size=copies, min_size=max(1, copies - 1))
    settings = LabSettings(
        hosts=tuple(_NAMES[:hosts]), etcd_members=etcd_members, managers=managers, ceph=ceph
    )
    # A signal while it starts unwinds; one from then on is the orderly end.
    with Stopping() as stopping, Lab(settings).started(RichProgress(), stopping.hold) as running:
        described = _describe(running)
        if as_json:
            print_json(described, compact=True)
        else:
            _print(described)
        stopping.wait()


def _describe(lab: "Lab") -> dict[str, Any]:
    return {
        "address": lab.network.address,
        "etcd": lab.etcd.endpoints,
        "etcdctl": lab.etcd_access.environment(lab.etcd),
        "etcd_root_password_file": str(lab.etcd_access.root_password_file),
        "ceph_conf": str(lab.ceph.conf_path),
        "ceph_client": "client.ringstone",
        "folder": str(lab.folder),
        "managers": [{"url": manager.url, "pid": manager.process.pid} for manager in lab.managers],
        "token_file": str(lab.credentials.token_file),
        "ca": str(lab.credentials.ca),
        "hosts": [
            {
                "name": host.name,
                "address": host.address,
                "namespace": lab.network.namespace(host.name),
                "socket": str(host.socket),
                "pid": host.gateway.pid,
            }
            for host in lab.hosts.values()
        ],
    }


def _print(described: dict[str, Any]) -> None:
    etcdctl = " ".join(f"{name}={shlex.quote(value)}" for name, value in described["etcdctl"].items())
    print(f"""
The cluster runs; logs are below {described["folder"]}. In another terminal:

    export CEPH_CONF={shlex.quote(described["ceph_conf"])}
    export {etcdctl}
    export ETCDCTL_USER=root:$(cat {shlex.quote(described["etcd_root_password_file"])})
    ceph status
    rbd ls rbd
    etcdctl endpoint health
""")
    if described["managers"]:
        print(f"""    export RINGSTONE_MANAGER={described["managers"][0]["url"]}
    export RINGSTONE_TOKEN_FILE={shlex.quote(described["token_file"])} RINGSTONE_CA={shlex.quote(described["ca"])}
    ringstone host list
""")
    for host in described["hosts"]:
        print(f"Host {host['name']}, {host['address']}, gateway process {host['pid']}:")
        print(f"    ringstone --socket {shlex.quote(host['socket'])} status")
        print(f"    ip netns exec {host['namespace']} ip -brief address")
    print("\nCtrl-C stops and removes all of it.", flush=True)
