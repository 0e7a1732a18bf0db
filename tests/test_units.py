"""Sizes and counts, to and from text."""

import pytest

from lowmem.system.units import format_bytes, format_count, format_seconds, parse_bytes, parse_count


@pytest.mark.parametrize(
    "text, expected",
    [("2GiB", 2 * 1024**3), ("2GB", 2 * 10**9), ("512 MiB", 512 * 1024**2), ("0", 0), ("1.5g", 1_500_000_000), (17, 17), ("3b", 3)],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "two", "2 GiBs", "-1GiB", "1e3GiB"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_bytes(text)


@pytest.mark.parametrize("text, expected", [("5M", 5_000_000), ("1.5B", 1_500_000_000), ("200k", 200_000), ("1e6", 1_000_000), (3, 3)])
def test_parse_count(text, expected):
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "5Q"])
def test_parse_count_refuses(text):
    with pytest.raises(ValueError, match="expected a count such as"):
        parse_count(text)


def test_formats():
    assert format_bytes(2469606195) == "2.30 GiB"
    assert format_bytes(1023) == "1023 B"
    assert format_count(12691186) == "12.69M"
    assert format_seconds(3725) == "1:02:05"
    assert format_seconds(59.6) == "1:00"


@pytest.mark.parametrize("text", ["9" * 400, "1e999", "nan", "inf", "-1", "1e-3"])
def test_counts_that_are_none(text):
    with pytest.raises(ValueError, match="expected a count such as"):
        parse_count(text)
