"""Documents of a .parquet file: one row each."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from lowmem.data.compression import open_compressed, strip_compression
from lowmem.data.json_lines import MAX_LINE_BYTES
from lowmem.data.storage import storage_errors
from lowmem.data.text_source import ReadCounters
from lowmem.data.utf8 import DecodeErrors, decode_value
from lowmem.errors import DataError, StorageError
from lowmem.units import format_bytes

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
    Memory: some pages of one column, and 32 MiB of its text or one row.
    """
    with _readable(path) as readable:
        before, size = counters.input_bytes, path.stat().st_size
        for row, rows, data in _values(path, readable, field):
            if data is None:
                raise DataError(f"{path}: row {row} has null in {field!r}, expected text; mend the row")
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
            _check_column(path, field, file.schema_arrow)
            for group in range(file.num_row_groups):
                size = _batch_rows(path, field, file.metadata.row_group(group))
                # columns below the name, as in "text.lang", come too
                for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=[field], use_threads=False):
                    for value in _bytes_of(batch.column(batch.schema.names.index(field))):
                        row += 1
                        yield row, rows, value
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, row, str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__) from error


def _batch_rows(path: Path, field: str, group: Any) -> int:
    """Rows of a row group whose text may be unpacked at once."""
    rows = max(1, group.num_rows)
    chunks = [chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema == field]
    unpacked = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    packed = max(1, sum(chunk.total_compressed_size for chunk in chunks))
    if unpacked > MAX_LINE_BYTES * rows or unpacked > max(_MAX_RATIO_BYTES, _MAX_RATIO * packed):
        raise DataError(
            f"{path}: {rows} rows of {field!r} unpack from {format_bytes(packed)} to {format_bytes(unpacked)}, allowed are "
            f"{format_bytes(MAX_LINE_BYTES)} a row and a ratio of {_MAX_RATIO}; divide the rows, or replace the file"
        )
    # values of a dictionary are stored once and unpacked for every row
    shared = [chunk.data_page_offset - chunk.dictionary_page_offset for chunk in chunks if chunk.has_dictionary_page]
    largest = max(unpacked // rows, max(shared, default=0) * unpacked // packed // _BATCH_ROWS, 1)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // largest))


def _bytes_of(array: Any) -> Iterator[bytes | None]:
    """The values of a column of text or bytes, not decoded: text in parquet need not be UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(array.type):
        values = _as_binary(array.dictionary)
        for index in array.indices.to_pylist():
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


def _check_column(path: Path, field: str, schema: Any) -> None:
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
