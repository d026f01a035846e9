"""Takes libraries away from a dynamically linked program that does not need them for what it will do.

Debian's fio links Ceph, Gluster, libnbd, RDMA and persistent-memory libraries for engines that a guest never
uses; with what they load in turn they are 75 MB that every boot would unpack and every start of fio relocate.
Dropping a library removes its DT_NEEDED entry and its version requirements, and makes undefined symbols weak,
so that the loader resolves the ones that are gone to 0. Calling one of them crashes the program.

Sources: the ELF-64 object file format, and the Linux Standard Base's "Symbol Versioning" for the version
requirements.
"""

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

_SHT_DYNAMIC = 6
_SHT_DYNSYM = 11
_SHT_GNU_VERNEED = 0x6FFFFFFE
_DT_NULL = 0
_DT_NEEDED = 1
_DT_VERNEEDNUM = 0x6FFFFFFF
_STB_GLOBAL = 1
_STB_WEAK = 2
_SYMBOL = struct.Struct("<IBBHQQ")
_DYNAMIC = struct.Struct("<qQ")
_VERNEED = struct.Struct("<HHIII")


@dataclass(frozen=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def drop_libraries(program: bytes, keep: Collection[str]) -> bytes:
    """`program`, a little-endian 64-bit ELF file, needing of its libraries only those named (by soname) in
    `keep`."""
    if program[:6] != b"\x7fELF\x02\x01":
        raise ValueError("This is not a little-endian 64-bit ELF file.")
    image = bytearray(program)
    sections = _sections(image)
    (dynamic,) = (section for section in sections if section.kind == _SHT_DYNAMIC)
    strings = sections[dynamic.link].offset

    def text(offset: int) -> str:
        start = strings + offset
        return image[start : image.index(b"\0", start)].decode()

    needs = 0
    for section in sections:
        if section.kind == _SHT_GNU_VERNEED:
            needs = _drop_version_needs(image, section, lambda name: text(name) in keep)
        elif section.kind == _SHT_DYNSYM:
            _weaken_undefined(image, section)
    entries = list(_DYNAMIC.iter_unpack(image[dynamic.offset : dynamic.offset + dynamic.size]))
    kept = [
        (tag, needs if tag == _DT_VERNEEDNUM else value)
        for tag, value in entries
        if tag != _DT_NEEDED or text(value) in keep
    ]
    kept += [(_DT_NULL, 0)] * (len(entries) - len(kept))
    for index, entry in enumerate(kept):
        _DYNAMIC.pack_into(image, dynamic.offset + index * _DYNAMIC.size, *entry)
    return bytes(image)


def _sections(image: bytearray) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", image, 40)
    entry_size, count = struct.unpack_from("<HH", image, 58)
    sections = []
    for index in range(count):
        _, kind, _, _, offset, size, link = struct.unpack_from("<IIQQQQI", image, table + index * entry_size)
        sections.append(_Section(kind, offset, size, link))
    return sections


def _drop_version_needs(image: bytearray, section: _Section, keeps: Callable[[int], bool]) -> int:
    """Relink the chain of requirements over the dropped libraries; how many are left. The first one stays
    where it is because DT_VERNEED points there, so a kept one is moved into its place."""
    records: list[tuple[int, tuple[int, int, int, int, int]]] = []
    at = section.offset
    while True:
        version, count, file, aux, following = _VERNEED.unpack_from(image, at)
        if keeps(file):
            records.append((at, (version, count, file, aux, following)))
        if not following:
            break
        at += following
    places = [section.offset, *(at for at, _ in records[1:])]
    for index, (place, (old, (version, count, file, aux, _))) in enumerate(zip(places, records, strict=True)):
        following = places[index + 1] - place if index + 1 < len(places) else 0
        _VERNEED.pack_into(image, place, version, count, file, old + aux - place, following)
    return len(records)


def _weaken_undefined(image: bytearray, section: _Section) -> None:
    for at in range(section.offset, section.offset + section.size, _SYMBOL.size):
        name, info, other, defined_in, value, size = _SYMBOL.unpack_from(image, at)
        if defined_in == 0 and info >> 4 == _STB_GLOBAL:
            _SYMBOL.pack_into(image, at, name, _STB_WEAK << 4 | info & 0xF, other, defined_in, value, size)
