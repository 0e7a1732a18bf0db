"""Writes token shards one after the other, each of them whole or absent."""

import hashlib
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from lowmem.data.storage import storage_errors, write_json

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class FinishedShard:
    """A shard on disk, and where in the source the next one begins.

    Attributes:
        file: its name in the folder.
        tokens: how many it holds.
        sha256: hash of its bytes.
        mtime_ns: modification time right after writing: while it stays, the hash need not be computed again.
        next_piece: pieces of the source that are in this and earlier shards completely.
        next_offset: tokens of the piece after those that are there too.
    """

    file: str
    tokens: int
    sha256: str
    mtime_ns: int
    next_piece: int
    next_offset: int


class ShardWriter:
    """Appends tokens to flat little-endian files of `shard_tokens` tokens each.

    Every finished shard is recorded in progress.json, so that an interrupted build goes on from there.

    Args:
        folder: where the shards go.
        dtype: uint16 or uint32.
        finished: shards of an interrupted build that are intact.
    Memory: nothing beyond what `append` is given.
    """

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int, finished: list[FinishedShard]):
        self.finished = list(finished)
        self.tokens = sum(shard.tokens for shard in finished)
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file: IO[bytes] | None = None
        self._held = 0
        self._digest = hashlib.sha256()

    def append(self, tokens: np.ndarray, piece: int, offset: int = 0) -> None:
        """Add the tokens of a piece.

        Args:
            tokens: (n,) of the writer's dtype.
            piece: the piece's number in the source.
            offset: tokens of the piece that come before these.
        Raises:
            StorageError: the disk is full, or not writable.
        """
        start = 0
        while start < len(tokens):
            part = tokens[start : start + self._shard_tokens - self._held]
            start += len(part)
            self._write(part)
            if self._held == self._shard_tokens:
                whole_piece = start == len(tokens)
                self._finish_shard(piece + whole_piece, 0 if whole_piece else offset + start)

    def close(self) -> None:
        """Finish the last shard, which may be shorter.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        if self._held:
            self._finish_shard(0, 0)

    def abandon(self) -> None:
        """Drop the unfinished shard; the finished ones stay."""
        if self._file is not None:
            # on a full disk closing fails as writing did, and that error is on its way already
            with suppress(OSError):
                self._file.close()
            self._file = None
            self._partial_path().unlink(missing_ok=True)

    def _write(self, part: np.ndarray) -> None:
        data = part.astype(self._dtype.newbyteorder("<"), copy=False).tobytes()
        with storage_errors(self._partial_path()):
            if self._file is None:
                self._file = open(self._partial_path(), "wb")  # noqa: SIM115 (closed when the shard is full)
            self._file.write(data)
        self._digest.update(data)
        self._held += len(part)
        self.tokens += len(part)

    def _finish_shard(self, next_piece: int, next_offset: int) -> None:
        partial, path = self._partial_path(), self._folder / self._name()
        file = self._file
        assert file is not None  # a shard is finished only after something was written to it
        with storage_errors(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(partial, path)
            mtime_ns = path.stat().st_mtime_ns
        self.finished.append(FinishedShard(path.name, self._held, self._digest.hexdigest(), mtime_ns, next_piece, next_offset))
        self._file, self._held, self._digest = None, 0, hashlib.sha256()
        record: list[dict[str, Any]] = [asdict(shard) for shard in self.finished]
        write_json(self._folder / PROGRESS_FILE, record)

    def _name(self) -> str:
        return f"tokens-{len(self.finished):05d}.bin"

    def _partial_path(self) -> Path:
        return self._folder / f"{self._name()}.partial"
