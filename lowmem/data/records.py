"""Records of JSON lines and of Parquet files, one at a time."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lowmem.data.decoding import (
    DecodeErrors,
    Utf8Reader,
    check_encoding,
    decode_value,
    open_compressed,
    replace_surrogates,
    strip_compression,
    without_marks,
)
from lowmem.data.text_source import ReadCounters
from lowmem.system.errors import DataError, StorageError
from lowmem.system.files import distinct_keys, storage_errors
from lowmem.system.units import format_bytes

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


_BATCH_ROWS = 256
_BATCH_BYTES = 32 * 1024**2
_SHOWN_COLUMNS = 20
_BLOCK_BYTES = 1024 * 1024
_MAGIC = b"PAR1"
_FREE_BYTES = 512 * 1024**2  # left for everybody else where a compressed file is unpacked
# Text shrinks to a hundredth at most; a column that claims more than this is made to fill the memory.
_MAX_RATIO, _MAX_RATIO_BYTES = 1000, 1024**3


def parquet_texts(path: Path, field: str, decode_errors: DecodeErrors, counters: ReadCounters) -> Iterator[str]:
    """The text of each row, a few rows at a time.

    A file compressed as a whole is unpacked to a temporary file first, because parquet is read from its end.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, `field` is missing or holds no text, or a row is not UTF-8 or too long.
        StorageError: no room to unpack.
    Memory: one column of one row group.
    """
    with _readable(path) as readable:
        before, size = counters.input_bytes, path.stat().st_size
        for row, rows, data in _values(path, readable, field):
            if data is None:
                raise DataError(f"{path}: row {row} has null in {field!r}, expected text; mend the row")
            if len(data) > MAX_LINE_BYTES:
                raise DataError(
                    f"{path}: row {row} has {format_bytes(len(data))} of text, allowed are {format_bytes(MAX_LINE_BYTES)}; divide it"
                )
            text, replaced = decode_value(data, f"{path}: row {row}", decode_errors)
            counters.replacements += replaced
            counters.input_bytes = before + size * row // rows
            yield text


@contextmanager
def _readable(path: Path) -> Iterator[Path | BinaryIO]:
    """The file, unpacked if it is compressed as a whole; what was unpacked has no name and goes with its last reader."""
    if not strip_compression(path)[1]:
        with open_compressed(path):
            pass  # says what cannot be opened, in its own words
        yield path
        return
    folder = Path(tempfile.gettempdir())
    with storage_errors(folder):
        unpacked = tempfile.TemporaryFile(prefix="lowmem-")  # noqa: SIM115 (closed below)
    with unpacked:
        _unpack(path, unpacked, folder)
        yield cast(BinaryIO, unpacked)


def _unpack(path: Path, unpacked: IO[bytes], folder: Path) -> None:
    with open_compressed(path) as (stream, _):
        block = stream.read(_BLOCK_BYTES)
        if not block.startswith(_MAGIC):
            raise _damaged(path, 0, "it does not begin as one")
        while block:
            if shutil.disk_usage(folder).free < _FREE_BYTES:
                raise StorageError(
                    f"{path} unpacks to more than {folder} has room for while {format_bytes(_FREE_BYTES)} stay free; "
                    "free space there, set TMPDIR to a folder on a larger disk, or unpack the file yourself"
                )
            with storage_errors(folder):
                unpacked.write(block)
            block = stream.read(_BLOCK_BYTES)
    with storage_errors(folder):
        unpacked.flush()


def _damaged(path: Path, row: int, reason: str) -> DataError:
    return DataError(f"{path} is damaged or no parquet file, after row {row} ({reason}); replace it with an intact copy")


def _values(path: Path, readable: Path | BinaryIO, field: str) -> Iterator[tuple[int, int, bytes | None]]:
    """Number of the row, rows of the file, and the value as bytes."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading .parquet files needs the pyarrow package: pip install 'lowmem[hub]'") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(readable, memory_map=False, pre_buffer=False, buffer_size=_BLOCK_BYTES) as file:
            rows = file.metadata.num_rows
            check_text_column(path, field, file.schema_arrow)
            _check_ratio(path, file.metadata)
            for group in range(file.num_row_groups):
                size = _batch_rows(file, field, group)
                # columns below the name, as in "text.lang", come too
                for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=[field], use_threads=False):
                    for value in column_bytes(batch.column(batch.schema.names.index(field))):
                        row += 1
                        yield row, rows, value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last one: names of columns
        raise _damaged(path, row, str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__) from error


def _check_ratio(path: Path, metadata: Any) -> None:
    """Refuse a file that was made to fill the memory, before a page of it is unpacked."""
    unpacked = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    packed = max(1, path.stat().st_size)
    if unpacked > max(_MAX_RATIO_BYTES, _MAX_RATIO * packed):
        raise DataError(
            f"{path} unpacks from {format_bytes(packed)} to {format_bytes(unpacked)}, allowed is a ratio of {_MAX_RATIO}; replace the file"
        )


def _batch_rows(file: Any, field: str, group: int) -> int:
    """Rows of a row group whose text may be unpacked at once."""
    metadata = file.metadata.row_group(group)
    if metadata.total_byte_size * _BATCH_ROWS <= _BATCH_BYTES:
        return _BATCH_ROWS  # even if every row were the longest value there can be
    # a damaged description of the column ends the process below; reading a row finds it first, and reports it
    next(iter(file.iter_batches(batch_size=1, row_groups=[group], columns=[field], use_threads=False)), None)
    chunks = [metadata.column(leaf) for leaf in range(metadata.num_columns) if file.schema.column(leaf).path == field]
    unpacked = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    packed = max(1, sum(chunk.total_compressed_size for chunk in chunks))
    # values of a dictionary are stored once and unpacked for every row; any of them may fill the whole page
    shared = [chunk.data_page_offset - chunk.dictionary_page_offset for chunk in chunks if chunk.has_dictionary_page]
    largest = max(unpacked // max(1, metadata.num_rows), max(shared, default=0) * unpacked // packed, 1)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))


def column_bytes(array: Any) -> Iterator[bytes | None]:
    """The values of a pyarrow column of text or bytes, not decoded: such text need not be UTF-8.

    Raises:
        pyarrow.ArrowException: the column is damaged.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(array.type):
        values = _as_binary(array.dictionary)
        for index in array.indices.to_pylist():
            if index is not None and not 0 <= index < len(values):
                raise pyarrow.ArrowInvalid("a row names a value that its dictionary lacks")
            yield None if index is None else values[index].as_py()
        return
    for value in _as_binary(array):
        yield value.as_py()


def _as_binary(array: Any) -> Any:
    """The same values without a claim that they are UTF-8; copies nothing."""
    import pyarrow

    if pyarrow.types.is_string_view(array.type):
        return array.cast(pyarrow.binary_view())
    if pyarrow.types.is_large_string(array.type):
        return array.cast(pyarrow.large_binary())
    return array.cast(pyarrow.binary()) if pyarrow.types.is_string(array.type) else array


def check_text_column(path: Path | str, field: str, schema: Any) -> None:
    """Refuse a table without exactly one column `field`, of text or of bytes.

    Args:
        path: of the table, for the message.
        schema: pyarrow's.
    Raises:
        DataError: there is none, or several, or it holds something else.
    """
    import pyarrow

    count = schema.names.count(field)
    if count == 0:
        found = ", ".join(map(repr, schema.names[:_SHOWN_COLUMNS])) or "no columns"
        raise DataError(f"{path}: no column {field!r}, found {found}; set text_field of the source to the one with the text")
    if count > 1:
        raise DataError(f"{path}: {count} columns are named {field!r}; rename all but the one with the text")
    kind = schema.field(field).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary, types.is_binary_view)
    if not any(test(plain) for test in tests):
        raise DataError(f"{path}: column {field!r} is {kind}, expected text; set text_field of the source to the one with the text")
