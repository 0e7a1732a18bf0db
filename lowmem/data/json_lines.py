"""Documents of a .jsonl file: one JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.compression import open_compressed
from lowmem.data.text_source import ReadCounters
from lowmem.data.utf8 import DecodeErrors, Utf8Reader, replace_surrogates
from lowmem.errors import DataError

_BOM = b"\xef\xbb\xbf"


def json_line_texts(path: Path, field: str, decode_errors: DecodeErrors, counters: ReadCounters) -> Iterator[str]:
    """The text of each line; blank lines are passed over.

    Raises:
        DataError: a line is not UTF-8, not JSON, or has no text in `field`; the message names file and line.
    Memory: the longest line.
    """
    before = counters.input_bytes
    with open_compressed(path) as (stream, raw):
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith(_BOM):
                line = line[len(_BOM) :]
            if line.strip():
                reader = Utf8Reader(str(path), decode_errors, first_line=number)
                value = _parse(reader.decode(line, final=True), path, number)
                text, replaced = replace_surrogates(field_text(value, field, f"{path}:{number}"), str(path), number, decode_errors)
                counters.replacements += reader.replacements + replaced
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
        raise DataError(f"{place}: found {_kind(value)}, expected an object with the field {field!r}")
    if field not in value:
        found = ", ".join(map(repr, value)) or "no fields"
        raise DataError(f"{place}: no field {field!r}, found {found}; set text_field of the source to the one with the text")
    if not isinstance(value[field], str):
        raise DataError(
            f"{place}: field {field!r} is {_kind(value[field])}, expected text; mend the record, or set text_field of the source"
        )
    return value[field]


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{number}: malformed JSON ({error.msg} at column {error.colno}); expected one JSON object a line"
        ) from error
    except (RecursionError, ValueError) as error:
        # nesting and numbers beyond what Python's parser takes
        raise DataError(f"{path}:{number}: JSON that cannot be parsed ({error}); expected one JSON object a line") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
