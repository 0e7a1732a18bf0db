"""Hugging Face datasets as text."""

from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from lowmem.config import SourceConfig
from lowmem.data.json_lines import field_text
from lowmem.data.parquet_files import check_text_column, column_bytes
from lowmem.data.pieces import Piece, document_pieces, utf8_size
from lowmem.data.text_source import ReadCounters, TextSource
from lowmem.data.utf8 import DecodeErrors, decode_value
from lowmem.errors import DataError


def load_hub_dataset(config: SourceConfig) -> Any:
    """A `datasets.Dataset`, or an `IterableDataset` where `config.streaming` is set, with the text column alone.

    `config.hub` may also be a local folder of .parquet or .jsonl files. Code that comes with a dataset is never run.

    Raises:
        DataError: datasets is not installed, there is no such dataset, subset, split or column, or the network fails.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("hub datasets need the datasets package: pip install 'lowmem[hub]'") from error
    what = f"cannot load the dataset {config.hub!r}, split {config.split!r}"
    load = datasets.load_dataset
    dataset = call_hub(what, load, config.hub, config.subset or None, split=config.split, streaming=config.streaming)
    columns = dataset.column_names
    if columns is None:
        return dataset
    if config.text_field not in columns:
        raise DataError(
            f"the dataset {config.hub!r} has no column {config.text_field!r}, found {', '.join(map(repr, columns))}; "
            "set text_field of the source to the one with the text"
        )
    return dataset.select_columns([config.text_field])


def load_hub_rows(config: SourceConfig, fields: Container[str]) -> Iterator[dict[str, Any]]:
    """The rows of a hub dataset, for records that are more than a text.

    Args:
        fields: columns to read; of the others a row has the names, with "".
    Raises:
        DataError: see `load_hub_dataset`; or a row has what Python cannot hold.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("hub datasets need the datasets package: pip install 'lowmem[hub]'") from error
    what = f"cannot load the dataset {config.hub!r}, split {config.split!r}"
    dataset = call_hub(what, datasets.load_dataset, config.hub, config.subset or None, split=config.split)
    columns = dataset.column_names
    if not any(name in fields for name in columns):
        raise DataError(f"the dataset {config.hub!r} has the columns {', '.join(map(repr, columns))}, none of which a conversation has")
    unread = dict.fromkeys((name for name in columns if name not in fields), "")
    rows, number = iter(dataset.select_columns([name for name in columns if name in fields])), 0
    while (row := call_hub(f"reading the dataset {config.hub!r} after row {number}", next, rows, None)) is not None:
        number += 1
        yield unread | row


def call_hub(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the datasets package and report whatever it raises in one line.

    Args:
        what: the beginning of the message, such as "cannot load the dataset 'x'".
    Raises:
        DataError: the call failed.
    """
    try:
        return function(*args, **kwargs)
    except (MemoryError, StopIteration, DataError):
        raise
    except Exception as error:  # datasets, fsspec and the HTTP library beneath raise classes without a common base
        # datasets wraps what went wrong while it builds its cache
        found = error.__cause__ if isinstance(error.__cause__, Exception) and "generating" in str(error) else error
        reason = (str(found).strip().splitlines() or [type(found).__name__])[0].rstrip(".")
        raise DataError(f"{what}: {reason}; check the name and the network, or use a local path") from error


class HubSource(TextSource):
    """A downloaded dataset, row by row. The download is kept in the datasets package's own cache."""

    def __init__(self, config: SourceConfig, decode_errors: DecodeErrors):
        self.label = config.hub
        self._config, self._decode_errors = config, decode_errors
        self._dataset = load_hub_dataset(config)

    def identity(self) -> dict[str, Any]:
        config = self._config
        # the folders of the cached files carry the hash of the dataset's version and settings
        stamps = call_hub(
            f"reading the cached dataset {self.label!r}", lambda: [[str(file), file.stat().st_size] for file in self._files()]
        )
        return {
            "kind": "hub",
            "name": config.hub,
            "subset": config.subset,
            "split": config.split,
            "text_field": config.text_field,
            "decode_errors": self._decode_errors,
            "rows": self._dataset.num_rows,
            "files": stamps,
        }

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        texts = self._dataset_texts() if "[" in self._config.split or not self._files() else self._unmapped_texts(counters)
        for text in texts:
            counters.input_bytes += utf8_size(text)
            yield from document_pieces(text)

    def _files(self) -> list[Path]:
        return [Path(file["filename"]) for file in self._dataset.cache_files]

    def _dataset_texts(self) -> Iterator[str]:
        rows, number = iter(self._dataset), 0
        while (row := call_hub(f"reading the dataset {self.label!r} after row {number}", next, rows, None)) is not None:
            number += 1
            yield field_text(row, self._config.text_field, f"{self.label}: row {number}")

    def _unmapped_texts(self, counters: ReadCounters) -> Iterator[str]:
        """The dataset itself maps its files into memory, and every page read would count as ours."""
        import pyarrow

        field, number = self._config.text_field, 0
        for name in self._files():
            try:
                with pyarrow.OSFile(str(name)) as file, pyarrow.ipc.open_stream(file) as batches:
                    check_text_column(self.label, field, batches.schema)
                    for batch in batches:
                        for data in column_bytes(batch.column(batch.schema.names.index(field))):
                            number += 1
                            place = f"{self.label}: row {number}"
                            if data is None:
                                raise DataError(f"{place}: field {field!r} is null, expected text; mend the record")
                            text, replaced = decode_value(data, place, self._decode_errors)
                            counters.replacements += replaced
                            yield text
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{name} is damaged after row {number} ({error}); delete it, so that it is downloaded again") from error


class StreamedSource(TextSource):
    """A dataset read over the network from its beginning each time; for what needs only a part of it."""

    streamed = True

    def __init__(self, config: SourceConfig):
        self.label = config.hub
        self._config = config

    def identity(self) -> dict[str, Any]:
        config = self._config
        return {"kind": "stream", "name": config.hub, "subset": config.subset, "split": config.split, "text_field": config.text_field}

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        for text in self.documents():
            counters.input_bytes += utf8_size(text)
            yield from document_pieces(text)

    def documents(self) -> Iterator[str]:
        """The text of each row.

        Raises:
            DataError: the network fails, or a row has no text.
        """
        rows = iter(load_hub_dataset(self._config))
        number = 0
        while (row := call_hub(f"reading the dataset {self.label!r} after row {number}", next, rows, None)) is not None:
            number += 1
            yield field_text(row, self._config.text_field, f"{self.label}: row {number}")
