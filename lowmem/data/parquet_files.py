"""Documents of a .parquet file: one row each."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.compression import open_compressed, strip_compression
from lowmem.data.storage import storage_errors
from lowmem.data.text_source import ReadCounters
from lowmem.errors import DataError

_BATCH_ROWS = 256
_BLOCK_BYTES = 1024 * 1024


def parquet_texts(path: Path, field: str, counters: ReadCounters) -> Iterator[str]:
    """The text of each row, row group by row group.

    A file compressed as a whole is unpacked to a temporary file first, because parquet is read from its end.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or `field` is missing or holds no text.
        StorageError: no room to unpack.
    Memory: one column of one row group.
    """
    if not strip_compression(path)[1]:
        yield from _plain_texts(path, path, field, counters)
        return
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        unpacked = Path(folder) / "unpacked.parquet"
        with open_compressed(path) as (stream, _), open(unpacked, "wb", buffering=0) as file:
            while block := stream.read(_BLOCK_BYTES):
                with storage_errors(unpacked):
                    file.write(block)
        yield from _plain_texts(path, unpacked, field, counters)


def _plain_texts(path: Path, readable: Path, field: str, counters: ReadCounters) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("reading .parquet files needs the pyarrow package: pip install 'lowmem[hub]'") from error
    before, size, row = counters.input_bytes, path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(readable, memory_map=False, pre_buffer=False) as file:
            rows = file.metadata.num_rows
            _check_column(path, field, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[field], use_threads=False):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise DataError(f"{path}: row {row} has null in {field!r}, expected text; mend the row")
                    yield text
                counters.input_bytes = before + size * row // rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{path} is damaged or no parquet file, after row {row} ({reason}); replace it with an intact copy") from error


def _check_column(path: Path, field: str, schema: Any) -> None:
    import pyarrow

    if field not in schema.names:
        found = ", ".join(map(repr, schema.names)) or "no columns"
        raise DataError(f"{path}: no column {field!r}, found {found}; set text_field of the source to the one with the text")
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
        raise DataError(f"{path}: column {field!r} is {kind}, expected text; set text_field of the source to the one with the text")
