"""The decoder of what is on a drive with a store, against the golden vectors that the Rust side writes."""

import re
from pathlib import Path

import pytest

from ringstone.errors import InvalidError
from ringstone.pools.store_format import (
    Entry,
    Gone,
    Layer,
    Next,
    SlotRecord,
    Snapshot,
    SumsRecord,
    Volume,
    crc32c,
    decode_catalog,
    decode_journal,
    decode_page,
    decode_sums,
    decode_superblock,
)

FORMATS = Path(__file__).parents[2] / "docs/formats"
UUID = b"0123456789abcdef"
ROOT = Volume("root", 2, 1 << 30, 4, 0, 1_700_000_000, False, b"")
BEFORE = Snapshot("before", 3, 2, 1, 1 << 30, 1_700_000_001)


def vector(name: str) -> bytes:
    return (FORMATS / f"vectors/store-{name}.bin").read_bytes()


def test_the_checksum_is_the_one_of_rfc_3720() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"123456789") == 0xE3069283


def test_the_superblock_says_where_everything_is() -> None:
    superblock = decode_superblock(vector("superblock"))
    assert (superblock.uuid, superblock.boot, superblock.extent) == (UUID, b"fedcba9876543210", 64 << 10)
    assert (superblock.generation, superblock.incarnation, superblock.began) == (7, 3, 40)
    assert (superblock.table_generation, superblock.covered) == (5, 41)
    assert (superblock.replay_from, superblock.replay_incarnation) == (33, 2)
    assert (superblock.size, superblock.journal_at, superblock.journal_blocks) == (96 << 20, 1 << 20, 256)
    assert (superblock.catalog_at, superblock.catalog_len) == (2 << 20, 256 << 10)
    catalog = vector("catalog")
    assert (superblock.catalog_copy, superblock.catalog_bytes) == (1, len(catalog))
    assert superblock.catalog_crc == crc32c(catalog)
    first, second = superblock.zones
    assert first.table == superblock.catalog_at + 2 * superblock.catalog_len
    assert second.first == first.extents + first.tombs
    assert second.data + second.extents * superblock.extent <= superblock.size


def test_a_page_says_what_slots_hold() -> None:
    page = decode_page(vector("page"))
    assert (page.number, page.generation) == (5, 11)
    assert page.entries == (
        Entry(2, 77, 1, 0xFFFF, "data"),
        Entry(0, 0, 0, 0, "free"),
        Entry(5, 3, 1, 0x0006, "data"),
        Entry(5, 100, 9, 0xFFFF, "zero"),
    )


def test_a_block_of_the_journal_has_every_kind_of_record() -> None:
    block = decode_journal(vector("journal"))
    assert (block.number, block.incarnation, block.began, block.marked) == (42, 3, 40, 41)
    assert (block.settled, block.last) == (39, True)
    assert block.records == (
        SlotRecord(9, Entry(5, 77, 1, 1, "data")),
        SlotRecord(10, Entry(0, 0, 0, 0, "free")),
        ROOT,
        Gone("volume", 6),
        BEFORE,
        Gone("snapshot", 3),
        Layer(4, 0),
        Gone("layer", 1),
        Next(9),
        SumsRecord(9, 14, False, (1, 0xFFFF_FFFF)),
        SumsRecord(12, 0, True, (0x1234_5678,)),
    )


def test_a_page_of_checksums() -> None:
    page = decode_sums(vector("sums"))
    assert page.number == 21
    assert page.sums == tuple(n * 0x9E37_79B9 & 0xFFFF_FFFF for n in range(1008))


def test_the_catalog_is_made_of_changes() -> None:
    copy = Volume("größe", 6, 512, 7, 3, 1_700_000_002, True, b"wrapped")
    layers = [Layer(1, 0), Layer(4, 1), Layer(7, 1)]
    assert decode_catalog(vector("catalog")) == [Next(8), *layers, ROOT, copy, BEFORE]


@pytest.mark.parametrize(
    ("name", "decode"),
    [
        ("superblock", decode_superblock),
        ("page", decode_page),
        ("journal", decode_journal),
        ("sums", decode_sums),
    ],
)
def test_a_flipped_bit_is_found(name: str, decode: type) -> None:
    for at in (0, 9, 100, 4000, 4095):
        spoiled = bytearray(vector(name))
        spoiled[at] ^= 1
        with pytest.raises(InvalidError):
            decode(bytes(spoiled))


def test_a_catalog_that_ends_in_its_midst_is_refused() -> None:
    with pytest.raises(InvalidError, match="ends in its midst"):
        decode_catalog(vector("catalog")[:-1])


def test_the_document_names_every_field_of_the_superblock() -> None:
    text = (FORMATS / "store.md").read_text()
    offsets = [
        int(offset)
        for offset in re.findall(r"^\| (\d+) \| u", text.split("## Superblock")[1].split("A zone:")[0], re.M)
    ]
    assert offsets == [
        0,
        8,
        12,
        16,
        32,
        48,
        56,
        64,
        72,
        80,
        88,
        96,
        104,
        112,
        120,
        128,
        136,
        140,
        144,
        148,
        150,
        4092,
    ]
