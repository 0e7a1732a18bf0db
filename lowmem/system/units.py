"""Bytes, counts and seconds to and from text: the only place that knows 1024."""

import math
import re

_BINARY = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(?:([kmgt])(i?)b?|(b))\s*", re.IGNORECASE | re.ASCII)
_BARE_PATTERN = re.compile(r"\s*[0-9]*\.?[0-9]+\s*", re.ASCII)
_MOST_BYTES = 2**60
_COUNT_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]{1,3})?)\s*([kmbgt]?)\s*", re.IGNORECASE | re.ASCII)
_MOST_CHARACTERS = 40


def parse_bytes(text: str | int) -> int:
    """Bytes in "2GiB" (1024-based), "2GB" (1000-based), "512MiB", "17B" or "0"; a number itself is a number of bytes.

    Raises:
        ValueError: the text is no size, has no unit, or is more than 2^60 bytes.
    """
    if isinstance(text, int):
        return text
    found = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    match = _BYTES_PATTERN.fullmatch(text)
    if not match and _BARE_PATTERN.fullmatch(text):
        if not float(text):
            return 0
        raise ValueError(f"found {found}, which has no unit and would be bytes; write {found.strip()}GiB, or {found.strip()}B for bytes")
    if not match:
        raise ValueError(f"found {found!r}, expected a size such as 2GiB, 512MiB or 8GB")
    number, prefix, binary = float(match[1]), (match[2] or "").lower(), bool(match[3])
    size = number * (_BINARY if binary else _DECIMAL)[prefix]
    if size > _MOST_BYTES:
        raise ValueError(f"found {found}, more than any machine has; expected a size such as 2GiB, 512MiB or 8GB")
    return round(size)


def format_bytes(count: int | float) -> str:
    """A size for people: 2469606195 -> "2.30 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def parse_count(text: str | int | float) -> int:
    """A count of tokens or steps in "5M", "1.5B", "200k", "1e6" or a plain number.

    Raises:
        ValueError: the text is no count.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"found {text}, expected a count such as 5000000, 5M or 1.5B")
        return text
    match = _COUNT_PATTERN.fullmatch(text := str(text))
    count = float(match[1]) * _COUNT[match[2].lower()] if match else math.inf
    if not match or not math.isfinite(count):
        found = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
        raise ValueError(f"found {found!r}, expected a count such as 5000000, 5M or 1.5B")
    return round(count)


def format_count(count: int | float) -> str:
    """A count for people: 12691186 -> "12.69M"."""
    value = float(count)
    for unit in ("", "k", "M"):
        if abs(value) < 1000:
            return f"{value:.0f}" if not unit else f"{value:.2f}{unit}"
        value /= 1000
    return f"{value:.2f}B"


def format_seconds(seconds: float) -> str:
    """A duration for people: 3725 -> "1:02:05"."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
