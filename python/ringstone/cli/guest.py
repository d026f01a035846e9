"""`ringstone qemu-args` and `ringstone libvirt-xml`: what starts a VM with an attached volume as its disk."""

import shlex
from enum import StrEnum
from typing import Annotated

import typer

from ringstone.cli.context import CliContext, JsonOption, VolumeName, context_of, print_json, size_argument
from ringstone.hypervisor import args
from ringstone.models import Attachment

MemoryOption = Annotated[
    int, typer.Option(parser=size_argument, metavar="SIZE", help="The guest's memory, such as 4G.")
]
HugepagesOption = Annotated[
    bool, typer.Option("--hugepages", help="Guest memory in huge pages instead of a memfd.")
]
PackedOption = Annotated[
    bool,
    typer.Option(
        "--packed/--no-packed", help="Offer packed rings; a guest whose driver lacks them uses split ones."
    ),
]


class DomainType(StrEnum):
    KVM = "kvm"
    QEMU = "qemu"


class ArgsFormat(StrEnum):
    SHELL = "shell"
    JSON = "json"


def _attachment(cli: CliContext, volume: str) -> Attachment:
    with cli.client() as client:
        return client.attachment(volume)


def qemu_args(
    context: typer.Context,
    name: VolumeName,
    output: Annotated[
        ArgsFormat, typer.Option("--format", help="One shell line, or a JSON list.")
    ] = ArgsFormat.SHELL,
    memory: MemoryOption = 1 << 30,
    hugepages: HugepagesOption = False,
    packed: PackedOption = True,
    json_output: JsonOption = False,
) -> None:
    """Print the QEMU arguments that give a VM this volume: shared memory, socket, disk."""
    cli = context_of(context, json_output)
    attachment = _attachment(cli, name)
    arguments = args.qemu_args(
        attachment.socket,
        volume=name,
        queues=attachment.queues,
        memory_bytes=memory,
        hugepages=hugepages,
        packed=packed,
    )
    if cli.json or output is ArgsFormat.JSON:
        print_json({"args": arguments})
    else:
        print(shlex.join(arguments))


def libvirt_xml(
    context: typer.Context,
    name: VolumeName,
    memory: MemoryOption = 1 << 30,
    hugepages: HugepagesOption = False,
    packed: PackedOption = True,
    domain_type: Annotated[
        DomainType, typer.Option("--domain-type", help="kvm, or qemu for a guest that is emulated.")
    ] = DomainType.KVM,
    disk: Annotated[
        bool, typer.Option("--disk", help="Only the disk, for `virsh attach-device` or another domain.")
    ] = False,
    target: Annotated[str, typer.Option(help="The disk's name in the domain, vdb for a second one.")] = "vda",
    json_output: JsonOption = False,
) -> None:
    """Print the libvirt domain XML that gives a VM this volume: shared memory and the disk."""
    cli = context_of(context, json_output)
    attachment = _attachment(cli, name)
    if disk:
        xml = args.libvirt_disk_xml(attachment.socket, queues=attachment.queues, packed=packed, target=target)
    else:
        xml = args.libvirt_xml(
            attachment.socket,
            volume=name,
            queues=attachment.queues,
            memory_bytes=memory,
            hugepages=hugepages,
            packed=packed,
            target=target,
            domain_type=domain_type,
        )
    if cli.json:
        print_json({"xml": xml})
    else:
        print(xml)
