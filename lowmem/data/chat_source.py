"""Conversations of a source: read, rendered as text for a tokenizer to learn from, and kept as tokens in the cache."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.config import SourceConfig
from lowmem.data.chat_records import (
    CHAT_FORMATS,
    CONVERT,
    FIELDS,
    Conversation,
    chat_format,
    parse_record,
    read_conversations,
    without_nulls,
)
from lowmem.data.chat_template import ChatTemplate
from lowmem.data.pieces import Piece, document_pieces, utf8_size
from lowmem.data.progress import DataProgress, ProgressCallback
from lowmem.data.storage import exclusive_lock, file_sha256, json_sha256, make_directory, storage_errors, write_json
from lowmem.data.template_worker import WORKER
from lowmem.data.text_files import file_stamps, find_files
from lowmem.data.text_source import ReadCounters, TextSource
from lowmem.data.tokenizers import Tokenizer
from lowmem.data.utf8 import DecodeErrors
from lowmem.errors import DataError

_FORMAT = 3  # another number where the same records give other tokens, so that those made before are not taken
_SAID = 1 << 31  # the bit of a token that the assistant says
_INDEX = "index.json"
_REPORT_CONVERSATIONS = 256


class ChatSource(TextSource):
    """Files or a hub dataset of conversations, each rendered as one document.

    Args:
        config: with path or hub.
        template: how they are written.
        decode_errors: what becomes of bytes that are not UTF-8, and of lone surrogates.
        remedy: for them, told where they are refused.
    Raises:
        DataError: no such file or dataset.
    """

    def __init__(self, config: SourceConfig, template: ChatTemplate, decode_errors: DecodeErrors = "fail", remedy: str = CONVERT):
        self.label = config.path or config.hub
        self.template = template
        self._decode_errors, self._remedy = decode_errors, remedy
        self._config = config
        found = find_files(config.path, chat_format, CHAT_FORMATS) if config.path else None
        self._files, self.note = (found.files, found.note(config.path)) if found else ([], "")
        self.total_bytes = sum(file.stat().st_size for file in self._files) or None

    def identity(self) -> dict[str, Any]:
        common = {"kind": "chat", "template": [self.template.source, self.template.names], "decode_errors": self._decode_errors}
        if self._config.path:
            return {**common, "files": file_stamps(self._files)}
        return {**common, "hub": self._config.hub, "subset": self._config.subset, "split": self._config.split}

    def pieces(self, counters: ReadCounters) -> Iterator[Piece]:
        for conversation in self.conversations():
            text = self.template.render(conversation)
            counters.input_bytes += utf8_size(text)
            yield from document_pieces(text)

    def conversations(self) -> Iterator[Conversation]:
        """The conversations in the order of the files.

        Raises:
            DataError: malformed, naming file and record.
        """
        for file in self._files:
            yield from read_conversations(file, self._decode_errors, self._remedy)
        if self._config.hub:
            from lowmem.data.hub import load_hub_rows

            for number, row in enumerate(load_hub_rows(self._config, FIELDS), start=1):
                yield parse_record(without_nulls(dict(row)), f"{self.label}: row {number}", self._decode_errors, self._remedy)


class ChatTokens:
    """Tokenised conversations on disk.

    Attributes:
        hashes: (conversations,) uint64 of what each record says, whatever the template, the tokenizer and the other records.
    Memory: mapped files: pages that were read, which the kernel may take back.
    """

    def __init__(self, folder: Path, label: str):
        self.label = label
        self.sha256 = file_sha256(folder / "tokens.bin")
        self._tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
        self._ends = np.fromfile(folder / "ends.bin", dtype=np.int64)
        self.hashes = np.fromfile(folder / "hashes.bin", dtype=np.uint64)

    def __len__(self) -> int:
        """Conversations."""
        return len(self._ends)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens,) int64, and (tokens,) bool where the assistant says them."""
        start = self._ends[number - 1] if number else 0
        packed = np.asarray(self._tokens[start : self._ends[number]])
        return (packed & ~np.uint32(_SAID)).astype(np.int64), packed >= _SAID

    def tokens(self) -> int:
        """Of all conversations."""
        return len(self._tokens)


def build_chat_tokens(source: ChatSource, tokenizer: Tokenizer, cache: Path, progress: ProgressCallback) -> ChatTokens:
    """The tokens of a source, from the cache if they are there and unchanged.

    Raises:
        DataError: malformed records, or none.
        StorageError: the cache cannot be written.
    Memory: one conversation, and 16 bytes for each.
    """
    identity = {"format": _FORMAT, "tokenizer": tokenizer.sha256(), "source": source.identity()}
    folder = cache / "chat" / json_sha256(identity)[:32]
    if source.note:
        progress(DataProgress("warning", source.label, message=source.note))
    make_directory(folder.parent)
    if not (folder / _INDEX).exists():
        message = f"another process prepares {source.label}; waiting for it"
        with exclusive_lock(folder.with_suffix(".lock"), lambda: progress(DataProgress("waiting", source.label, message=message))):
            if not (folder / _INDEX).exists():
                _write(source, tokenizer, folder, progress)
    WORKER.close()  # nothing is rendered for a while
    return ChatTokens(folder, source.label)


def _write(source: ChatSource, tokenizer: Tokenizer, folder: Path, progress: ProgressCallback) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_directory(unfinished)
    ends, hashes, total = [], [], 0
    with storage_errors(unfinished), open(unfinished / "tokens.bin", "wb") as file:
        for conversation in source.conversations():
            tokens, said = source.template.encode(tokenizer, conversation)
            file.write((tokens.astype(np.uint32) | np.where(said, _SAID, 0).astype(np.uint32)).tobytes())
            total += len(tokens)
            ends.append(total)
            hashes.append(int(json_sha256([conversation.messages, conversation.extras])[:16], 16))
            if len(ends) % _REPORT_CONVERSATIONS == 0:
                progress(DataProgress("tokens", source.label, tokens=total))
        if not ends:
            raise DataError(f"{source.label} holds no conversation")
        file.flush()
        os.fsync(file.fileno())
    with storage_errors(unfinished):
        np.array(ends, dtype=np.int64).tofile(unfinished / "ends.bin")
        np.array(hashes, dtype=np.uint64).tofile(unfinished / "hashes.bin")
    write_json(unfinished / _INDEX, {"conversations": len(ends), "tokens": total})
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
