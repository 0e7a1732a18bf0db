"""Datasets of the Hugging Face hub: stored, or streamed and tokenised on the fly."""

import hashlib
import json
from collections.abc import Callable, Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.config.schema import SourceConfig
from lowmem.data.decoding import DecodeErrors, decode_value
from lowmem.data.records import check_text_column, column_bytes, field_text
from lowmem.data.text_source import Piece, ReadCounters, TextSource, document_pieces, limit_bytes, utf8_size
from lowmem.data.tokenizers import Tokenizer
from lowmem.system.errors import CheckpointError, DataError
from lowmem.system.files import malformed


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


VALIDATION_WINDOWS = 128
_BYTES_PER_TOKEN = 6
_SCAN_BYTES = 256 * 1024**2


def is_held_out(text: str, val_fraction: float) -> bool:
    """Whether a document is for validation: a function of its text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


class HeldOutDocuments(StreamedSource):
    """The first held-out documents of a stream: about 128 windows, as far as its first 256 MiB of text hold so many."""

    def __init__(self, config: SourceConfig, *, seq_len: int, val_fraction: float):
        super().__init__(config)
        self._val_fraction = val_fraction
        self._wanted_bytes = VALIDATION_WINDOWS * (seq_len + 1) * _BYTES_PER_TOKEN
        self._scan_bytes = min(config.max_bytes or _SCAN_BYTES, _SCAN_BYTES)
        self.total_bytes = self._scan_bytes

    def identity(self) -> dict[str, Any]:
        limits = {"val_fraction": self._val_fraction, "wanted_bytes": self._wanted_bytes, "scan_bytes": self._scan_bytes}
        return {**super().identity(), **limits}

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        return limit_bytes(self._held_out_pieces(counters), self._wanted_bytes)

    def _held_out_pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        for text in self.documents():
            counters.input_bytes += utf8_size(text)
            if is_held_out(text, self._val_fraction):
                yield from document_pieces(text)
            if counters.input_bytes >= self._scan_bytes:
                return


class StreamedWindows:
    """Windows in the order of the stream, each one's last target being the next one's first input.

    The stream begins anew when it is exhausted. Documents of every `val_fraction` are passed over, because they are held out.

    Raises:
        DataError: the dataset cannot be loaded.
    Memory: one document, and the tokens of one piece of it.
    """

    windows_per_epoch = None

    def __init__(self, config: SourceConfig, tokenizer: Tokenizer, *, seq_len: int, val_fraction: float):
        self.label = config.hub
        self._config = config
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._val_fraction = val_fraction
        self._buffer: list[int] = []
        self._open(None, text_bytes=0)

    def window(self, drawn: int) -> np.ndarray:
        """The next window; a stream has one order, so `drawn` says nothing new.

        Raises:
            DataError: the network failed, a row holds no text, or a whole pass gives too little for one window.
        """
        passes = 0
        while len(self._buffer) <= self._seq_len:
            piece = next(self._pieces, None)
            if piece is not None:
                self._pieces_done += 1
                self._buffer += [*self._tokenizer.begin_ids] * piece.begins_document + self._tokenizer.encode(piece.text)
                self._buffer += [self._tokenizer.eos_id] * piece.ends_document
            elif not self._next_document():
                passes += 1
                if passes > 1:
                    raise DataError(f"{self.label} has too little text to train on sequences of {self._seq_len}; lower data.seq_len")
                self._open(None, text_bytes=0)
        window = np.array(self._buffer[: self._seq_len + 1], dtype=np.int64)
        del self._buffer[: self._seq_len]
        return window

    def state_dict(self) -> dict[str, Any]:
        """The position before the current document, how much of it was used, and the tokens left over."""
        state = {
            "dataset": self._state_before,
            "text_bytes": self._bytes_before,
            "in_document": self._in_document,
            "pieces_done": self._pieces_done,
            "buffer": self._buffer,
        }
        return json.loads(json.dumps(state))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: the state is malformed, or the stream no longer has the document it stopped in.
        """
        try:
            in_document, pieces_done = bool(state["in_document"]), int(state["pieces_done"])
            self._buffer = [int(token) for token in state["buffer"]]
            if pieces_done < 0 or not all(0 <= token < self._tokenizer.vocab_size for token in self._buffer):
                raise ValueError("a count is below 0, or a token is none of the tokenizer's")
            self._open(state["dataset"], text_bytes=int(state["text_bytes"]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # of the dataset's own state, too
            raise CheckpointError(f"the position in {self.label} is malformed ({malformed(error)})") from error
        if in_document:
            if not self._next_document():
                raise CheckpointError(f"{self.label} ends before the document that the checkpoint stopped in: it has changed since")
            self._pieces_done = sum(1 for _ in islice(self._pieces, pieces_done))

    def _open(self, dataset_state: dict[str, Any] | None, *, text_bytes: int) -> None:
        """Stand before the document at `dataset_state`; None is the beginning."""
        self._dataset = load_hub_dataset(self._config)
        if dataset_state is not None:
            self._dataset.load_state_dict(dataset_state)
        self._rows = iter(self._dataset)
        self._state_now, self._text_bytes = dataset_state, text_bytes
        self._state_before, self._bytes_before = dataset_state, text_bytes
        self._pieces: Iterator[Piece] = iter(())
        self._in_document, self._pieces_done = False, 0

    def _next_document(self) -> bool:
        """Stand at the beginning of the next document for training; False when the stream, or `max_bytes` of it, is through."""
        limit = self._config.max_bytes
        while not limit or self._text_bytes < limit:
            state, text_bytes = self._state_now, self._text_bytes
            row = call_hub(f"reading the dataset {self.label!r}", next, self._rows, None)
            if row is None:
                return False
            self._state_now = self._dataset.state_dict()
            text = field_text(row, self._config.text_field, f"{self.label}: after {text_bytes} bytes of text")
            self._text_bytes += utf8_size(text)
            if text and not is_held_out(text, self._val_fraction):
                self._state_before, self._bytes_before = state, text_bytes
                pieces = document_pieces(text)
                self._pieces = limit_bytes(pieces, limit - text_bytes) if limit else pieces
                self._in_document, self._pieces_done = True, 0
                return True
        return False
