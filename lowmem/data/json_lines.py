"""Documents of a .jsonl file: one JSON object a line."""

import json
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lowmem.data.compression import open_compressed
from lowmem.data.text_source import ReadCounters
from lowmem.data.utf8 import DecodeErrors, Utf8Reader, check_encoding, replace_surrogates, without_marks
from lowmem.errors import DataError
from lowmem.units import format_bytes

MAX_LINE_BYTES = 64 * 1024**2
_SPACE = re.compile("[ \t\r\n\ufeff]*")
_SHOWN_FIELDS = 20
_SHOWN_CHARACTERS = 60


def json_line_texts(path: Path, field: str, decode_errors: DecodeErrors, counters: ReadCounters) -> Iterator[str]:
    """The text of each line, and of each object where joined files left several on one; blank lines are passed over.

    Raises:
        DataError: a line is not UTF-8, not JSON, too long, or has no text in `field`; the message names file and line.
    Memory: the longest line, at most 64 MiB of it.
    """
    before, replaced_before, number = counters.input_bytes, counters.replacements, 0
    name = str(path)
    reader = Utf8Reader(name, decode_errors)
    with open_compressed(path) as (stream, raw):
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                check_encoding(name, line)
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{name}:{number}: a line of more than {format_bytes(MAX_LINE_BYTES)}, which is what is allowed; "
                    "divide the document, or give it as .txt"
                )
            decoded = without_marks(reader.decode(line, final=True))  # also of blank lines, which it counts
            if decoded.isspace():
                continue
            place = f"{name}:{number}"
            for value in _parse(decoded, place):
                text, replaced = replace_surrogates(field_text(value, field, place), name, number, decode_errors)
                replaced_before += replaced
                counters.replacements = replaced_before + reader.replacements
                counters.input_bytes = before + raw.tell()
                yield text


def field_text(value: Any, field: str, place: str) -> str:
    """The text in `field` of a parsed record.

    Args:
        place: file and line, for the message.
    Raises:
        DataError: the record is no object, lacks the field, or holds something else than text there.
    """
    if not isinstance(value, dict):
        raise DataError(f"{place}: found {value_kind(value)}, expected an object with the field {field!r}")
    if field not in value:
        found = ", ".join(map(repr, islice(value, _SHOWN_FIELDS))) or "no fields"
        raise DataError(f"{place}: no field {field!r}, found {found}; set text_field of the source to the one with the text")
    if not isinstance(value[field], str):
        raise DataError(
            f"{place}: field {field!r} is {value_kind(value[field])}, expected text; mend the record, or set text_field of the source"
        )
    return value[field]


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of json: JSON leaves open which of two equal keys counts, and Python would take the last without a word.

    Raises:
        ValueError: a key occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:_SHOWN_CHARACTERS]!r} occurs twice in one object")
    return value


def value_kind(value: Any) -> str:
    """What a value is called in JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), "no JSON")


def _parse(line: str, place: str) -> Iterator[Any]:
    """The values of a line one after the other; where the first is no object there is only one."""
    position = 0
    while (position := _after_space(line, position)) < len(line):
        try:
            value, position = _DECODER.raw_decode(line, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: malformed JSON ({error.msg} at column {error.colno}); expected one JSON object a line") from error
        except (RecursionError, ValueError) as error:
            # nesting beyond what Python's parser takes
            raise DataError(f"{place}: JSON that cannot be parsed ({error}); expected one JSON object a line") from error
        yield value


def _after_space(line: str, position: int) -> int:
    found = _SPACE.match(line, position)
    assert found is not None
    return found.end()


def _number(digits: str) -> float:
    """Stands for every number: nothing here computes with them, Python refuses long ones, and equal ones take no memory."""
    return 0.0


_DECODER = json.JSONDecoder(object_pairs_hook=distinct_keys, parse_int=_number, parse_float=_number)
