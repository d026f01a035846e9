import pytest

from ringstone.units import format_latency, format_rate, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 1024),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        (" 10 G ", 10 << 30),
        ("1.5T", 3 << 39),
        ("0.5K", 512),
        ("2P", 2 << 50),
    ],
)
def test_sizes_are_read_in_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "10GB", "10 kB", "-1", "1e9", "10X", "1.5", "0.3K", "ten", "1_000", "٣"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a (size|whole number)"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 << 30, "10 GiB"),
        (1023 << 20, "1023 MiB"),
        ((1 << 40) - 1, "1024 GiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_sizes_are_written_with_the_largest_fitting_unit(size: int, text: str) -> None:
    assert format_size(size) == text


def test_what_is_written_can_be_read() -> None:
    for size in (1, 512, 1 << 20, 3 << 39, 10 << 30):
        assert parse_size(format_size(size)) == size


def test_rates_and_latencies_have_three_digits() -> None:
    assert [format_rate(rate) for rate in (0, 0.5, 12, 1234, 1_234_567)] == [
        "0",
        "0.5",
        "12",
        "1.23k",
        "1.23M",
    ]
    assert [format_latency(ns) for ns in (None, 0, 850, 12_345, 4_560_000, 1_200_000_000)] == [
        "-",
        "0 ns",
        "850 ns",
        "12.3 us",
        "4.56 ms",
        "1.2 s",
    ]
