"""`ringstone qemu-args` and `ringstone libvirt-xml`: what starts a VM with an attached volume as its disk."""

import shlex
from enum import StrEnum
from typing import Annotated

import typer

from ringstone.cli.context import CliContext, JsonOption, VolumeName, context_of, print_json, size_argument
from ringstone.errors import InvalidError, NotFoundError
from ringstone.hypervisor import args
from ringstone.hypervisor.versions import NEWEST, QEMU, QemuVersion
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


def _version(program: str | None, version: str | None) -> QemuVersion:
    """Of the QEMU that the arguments are for."""
    if version is not None:
        if program is not None:
            raise InvalidError("--qemu and --qemu-version say the same thing; give one of them.")
        return QemuVersion.parse(version)
    try:
        return QemuVersion.of_program(program or QEMU)
    except NotFoundError:
        if program is not None:
            raise
        # It runs elsewhere.
        return NEWEST


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
    queue_size: Annotated[
        int | None,
        typer.Option(
            "--queue-size",
            help="Entries of each ring; what the QEMU at the other end of a migration has. Default: 256, and 1024 for "
            "QEMU 10.0.",
        ),
    ] = None,
    inflight_migration: Annotated[
        bool,
        typer.Option(
            "--inflight-migration",
            help="Have a migration take requests in flight along instead of waiting for them, at both ends.",
        ),
    ] = False,
    program: Annotated[
        str | None,
        typer.Option("--qemu", metavar="PROGRAM", help=f"The QEMU to ask for its version; default: {QEMU}."),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--qemu-version", metavar="VERSION", help="The version of another host's QEMU, such as 10.0."
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Print the QEMU arguments that give a VM this volume: shared memory, socket, disk."""
    cli = context_of(context, json_output)
    qemu = _version(program, version)
    attachment = _attachment(cli, name)
    disk = args.Disk(
        attachment.socket,
        name,
        attachment.queues,
        queue_size=queue_size,
        packed=packed,
        inflight_migration=inflight_migration,
    )
    arguments = args.qemu_args(disk, memory_bytes=memory, hugepages=hugepages, qemu=qemu)
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
