"""Tokenises a source into shards, once, resumably, in constant memory."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.pieces import PIECE_CHARS, Piece, utf8_size
from lowmem.data.progress import DataProgress, ProgressCallback, ignore_progress
from lowmem.data.shard_writer import PROGRESS_FILE, FinishedShard, ShardWriter
from lowmem.data.shards import FORMAT, INDEX_FILE, VERIFIED_FILE, TokenShards, is_count, is_shard_name, read_cached
from lowmem.data.storage import exclusive_lock, json_sha256, make_directory, write_json
from lowmem.data.text_source import ReadCounters, TextSource
from lowmem.data.tokenizer_probe import too_many_tokens
from lowmem.data.tokenizers import Tokenizer
from lowmem.errors import DataError

SHARD_TOKENS = 16 * 1024**2
_BATCH_CHARS = 512 * 1024


def build_shards(
    source: TextSource,
    tokenizer: Tokenizer,
    cache: Path,
    progress: ProgressCallback = ignore_progress,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """The shards of a source, from the cache if they are there and unchanged.

    Each document's tokens are followed by the end-of-document token. A second process that wants the same shards waits for
    the first. An interrupted build goes on after its last finished shard and ends with the same bytes.

    Args:
        cache: the cache's root; the entry's folder is named by a hash of the source's identity, the tokenizer and the format.
    Raises:
        DataError: malformed text, no text at all, a source that changed meanwhile, or a damaged cache entry.
        StorageError: the cache cannot be written.
    Memory: one batch of about 512 Ki characters and its tokens, whatever the size of the corpus.
    """
    identity = {
        "format": FORMAT,
        "piece_chars": PIECE_CHARS,
        "shard_tokens": shard_tokens,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256()},
        "source": source.identity(),
    }
    fingerprint = json_sha256(identity)
    folder = cache / "shards" / fingerprint[:32]
    make_directory(folder)
    if not (folder / INDEX_FILE).exists():
        message = f"another process prepares {source.label}; waiting for it"
        with exclusive_lock(folder.with_suffix(".lock"), lambda: progress(DataProgress("waiting", source.label, message=message))):
            if not (folder / INDEX_FILE).exists():
                _Build(source, tokenizer, folder, progress, shard_tokens).run(identity, fingerprint)
    return TokenShards.open(folder, progress)


@dataclass
class _Totals:
    """Sums over the whole source, those of skipped pieces included."""

    documents: int = 0
    text_bytes: int = 0


class _Build:
    """One pass over a source."""

    def __init__(self, source: TextSource, tokenizer: Tokenizer, folder: Path, progress: ProgressCallback, shard_tokens: int):
        self._source = source
        self._tokenizer = tokenizer
        self._folder = folder
        self._progress = progress
        self._counters = ReadCounters()
        self._totals = _Totals()
        self._visible = False  # something else than white space was read
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
        self._writer = ShardWriter(folder, self._dtype, shard_tokens, _intact_shards(folder, self._dtype))
        self._resumed = self._writer.finished[-1] if self._writer.finished else None

    def run(self, identity: dict[str, Any], fingerprint: str) -> None:
        try:
            for batch in self._batches():
                self._write(batch)
                self._report()
            self._writer.close()
        finally:
            self._writer.abandon()
        if not self._visible:
            what = "nothing but white space" if self._totals.documents else "no text"
            raise DataError(f"{self._source.label} holds {what}; check data.sources")
        if self._source.identity() != identity["source"]:
            raise DataError(f"{self._source.label} changed while it was read; run again once its files are complete")
        self._finish(identity, fingerprint)

    def _batches(self) -> Iterator[list[tuple[int, Piece]]]:
        """Pieces that are not in finished shards, with their numbers."""
        skip = self._resumed.next_piece if self._resumed else 0
        batch: list[tuple[int, Piece]] = []
        chars = 0
        for number, piece in enumerate(self._source.pieces(self._counters)):
            self._totals.text_bytes += utf8_size(piece.text)
            self._totals.documents += piece.ends_document
            self._visible = self._visible or not piece.text.isspace()
            if number < skip:
                continue
            batch.append((number, piece))
            chars += len(piece.text)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _write(self, batch: list[tuple[int, Piece]]) -> None:
        for (number, piece), ids in zip(batch, self._tokenizer.encode_batch([piece.text for _, piece in batch]), strict=True):
            if too_many_tokens(len(ids), len(piece.text)):
                raise DataError(
                    f"{self._source.label}: the tokenizer makes {len(ids)} tokens of {len(piece.text)} characters; "
                    "choose another data.tokenizer"
                )
            if piece.ends_document:
                ids.append(self._tokenizer.eos_id)
            offset = self._resumed.next_offset if self._resumed and self._resumed.next_piece == number else 0
            self._writer.append(np.array(ids, dtype=self._dtype)[offset:], number, offset)

    def _report(self) -> None:
        total, done = self._source.total_bytes, self._counters.input_bytes
        self._progress(DataProgress("tokens", self._source.label, min(done, total or done), total, self._writer.tokens))

    def _finish(self, identity: dict[str, Any], fingerprint: str) -> None:
        shards = self._writer.finished
        item_bytes = self._dtype.itemsize
        stamps = {shard.file: [shard.sha256, shard.tokens * item_bytes, shard.mtime_ns] for shard in shards}
        write_json(self._folder / VERIFIED_FILE, stamps)
        index = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "tokens": self._writer.tokens,
            **asdict(self._totals),
            "replacements": self._counters.replacements,
            "vocab_size": self._tokenizer.vocab_size,
            "eos_id": self._tokenizer.eos_id,
            "shards": [{"file": shard.file, "tokens": shard.tokens, "sha256": shard.sha256} for shard in shards],
            "fingerprint": fingerprint,
            "made_from": identity,
        }
        write_json(self._folder / INDEX_FILE, index)
        (self._folder / PROGRESS_FILE).unlink(missing_ok=True)


def _intact_shards(folder: Path, dtype: np.dtype) -> list[FinishedShard]:
    """Finished shards of an interrupted build, up to the first that is not as it was written."""
    try:
        recorded = [FinishedShard(**entry) for entry in read_cached(folder / PROGRESS_FILE)]
    except (OSError, ValueError, TypeError, RecursionError):
        return []  # nothing usable: build from the start
    intact = []
    for shard in recorded:
        counts = (shard.tokens, shard.next_piece, shard.next_offset, shard.mtime_ns)
        if not is_shard_name(shard.file) or not all(map(is_count, counts)) or not isinstance(shard.sha256, str):
            break
        path = folder / shard.file
        if not path.is_file():
            break
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (shard.tokens * dtype.itemsize, shard.mtime_ns):
            break
        intact.append(shard)
    return intact
