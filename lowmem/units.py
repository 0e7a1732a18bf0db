"""Bytes, counts and seconds to and from text: the only place that knows 1024."""

import re

_BINARY = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES_PATTERN = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_COUNT_PATTERN = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmbgt]?)\s*$", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes in "2GiB" (1024-based), "2GB" (1000-based), "512MiB", "0" or a plain number.

    Raises:
        ValueError: the text is no size.
    """
    match = _BYTES_PATTERN.match(str(text))
    if not match:
        raise ValueError(f"found {text!r}, expected a size such as 2GiB, 512MiB or 8GB")
    number, prefix, binary = match.groups()
    return round(float(number) * (_BINARY if binary else _DECIMAL)[prefix.lower()])


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
    match = _COUNT_PATTERN.match(str(text))
    if not match:
        raise ValueError(f"found {text!r}, expected a count such as 5000000, 5M or 1.5B")
    number, prefix = match.groups()
    return round(float(number) * _COUNT[prefix.lower()])


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
