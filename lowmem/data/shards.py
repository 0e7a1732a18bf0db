"""Token shards on disk: flat files of token ids, read in place and checked by hash."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lowmem.data.compression import irregular_kind
from lowmem.data.progress import DataProgress, ProgressCallback, ignore_progress
from lowmem.data.storage import file_sha256, malformed, write_json
from lowmem.errors import DataError, StorageError

INDEX_FILE = "index.json"
VERIFIED_FILE = "verified.json"
FORMAT = 1
_DTYPES = ("uint16", "uint32")
_COUNTS = ("tokens", "documents", "text_bytes", "replacements")
_SHARD_NAME = re.compile(r"tokens-[0-9]{5,}\.bin")


class TokenShards:
    """The tokens of one source, as one long sequence.

    Tokens are read with ordinary reads, not mapped: mapped pages would count as the process's memory for as long as the
    kernel likes, and a file cut short during the run would end it with a bus error instead of a message.

    Args:
        folder: written by `lowmem.data.build.build_shards`.
        index: its index.json.

    Attributes:
        metadata: index.json: dtype, tokens, documents, text_bytes, replacements, fingerprint and what it was made from.
    Memory: nothing that grows with the corpus but one number a shard.
    """

    def __init__(self, folder: Path, index: dict[str, Any]):
        self.metadata = index
        self._files = [folder / shard["file"] for shard in index["shards"]]
        self._dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in index["shards"])])

    @classmethod
    def open(cls, folder: Path, progress: ProgressCallback = ignore_progress) -> "TokenShards":
        """Open and check: sizes always, hashes unless a file still has the size and time at which its hash was right.

        Raises:
            DataError: the index or a shard is missing or damaged; names the file and the remedy.
        """
        index = _read_index(folder)
        _check_shards(folder, index, progress)
        return cls(folder, index)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start..start+count-1 as int64, across shard borders.

        Raises:
            ValueError: they are not all there.
            DataError: a shard has become shorter since it was opened.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise ValueError(f"found tokens {start}..{start + count - 1}, allowed 0..{len(self) - 1}")
        tokens = np.empty(count, dtype=np.int64)
        filled = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            first = start + filled - int(self._starts[shard])
            wanted = min(count - filled, int(self._starts[shard + 1]) - int(self._starts[shard]) - first)
            tokens[filled : filled + wanted] = self._read_shard(self._files[shard], first, wanted)
            filled += wanted
            shard += 1
        return tokens

    def _read_shard(self, path: Path, first: int, count: int) -> np.ndarray:
        try:
            part = np.fromfile(path, dtype=self._dtype, count=count, offset=first * self._dtype.itemsize)
        except OSError as error:
            raise damaged_shard(path, f"it cannot be read: {error.strerror}") from error
        if len(part) != count:
            raise damaged_shard(path, "it has become shorter")
        return part


def damaged_shard(path: Path, what: str) -> DataError:
    """The error for a file of a cache entry that is not what it was."""
    return DataError(f"the token shard {path} is damaged: {what}; delete the folder {path.parent} and run again, which rebuilds it")


def read_cached(path: Path) -> Any:
    """The JSON of a file in a cache entry.

    Raises:
        DataError: it is a pipe, a device or the like, which must be neither read nor written.
        OSError, ValueError, RecursionError: it cannot be read.
    """
    kind = irregular_kind(path.stat().st_mode)
    if kind:
        raise damaged_shard(path, f"it is {kind}")
    return json.loads(path.read_bytes().decode())


def is_shard_name(value: Any) -> bool:
    """Whether a name from a file of the cache is one that shards have: never one that leads out of their folder."""
    return isinstance(value, str) and _SHARD_NAME.fullmatch(value) is not None


def is_count(value: Any) -> bool:
    """Whether a value from a file of the cache can be a count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        index = read_cached(path)
        if index["format"] != FORMAT or index["dtype"] not in _DTYPES:
            raise ValueError(f"found format {index['format']} with {index['dtype']}, allowed {FORMAT} with {' or '.join(_DTYPES)}")
        for shard in index["shards"]:
            if not (is_shard_name(shard["file"]) and is_count(shard["tokens"]) and isinstance(shard["sha256"], str)):
                raise ValueError("a shard's entry is no file of this folder with a length and a hash")
        if not all(is_count(index[key]) for key in _COUNTS) or index["tokens"] != sum(shard["tokens"] for shard in index["shards"]):
            raise ValueError(f"{', '.join(_COUNTS)} must be counts, and tokens the sum over the shards")
        if not isinstance(index["fingerprint"], str):
            raise ValueError("the fingerprint is no text")
    except OSError as error:
        raise damaged_shard(path, f"the index cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged_shard(path, f"the index is malformed ({malformed(error)})") from error
    return index


def _check_shards(folder: Path, index: dict[str, Any], progress: ProgressCallback) -> None:
    verified = _read_verified(folder)
    item_bytes = np.dtype(index["dtype"]).itemsize
    total = sum(shard["tokens"] for shard in index["shards"]) * item_bytes
    done, stamps = 0, {}
    for shard in index["shards"]:
        path = folder / shard["file"]
        try:
            status = path.stat()
        except OSError as error:
            raise damaged_shard(path, f"it cannot be read: {error.strerror}") from error
        if kind := irregular_kind(status.st_mode):
            raise damaged_shard(path, f"it is {kind}")
        expected = shard["tokens"] * item_bytes
        if status.st_size != expected:
            raise damaged_shard(path, f"it has {status.st_size} bytes, expected {expected}")
        stamps[shard["file"]] = [shard["sha256"], status.st_size, status.st_mtime_ns]
        if verified.get(shard["file"]) != stamps[shard["file"]]:
            if (found := file_sha256(path)) != shard["sha256"]:
                raise damaged_shard(path, f"its SHA-256 is {found[:12]}..., expected {shard['sha256'][:12]}...")
            progress(DataProgress("check", str(path), done + expected, total))
        done += expected
    if stamps != verified:
        # a cache that may only be read works too: it is hashed at every opening
        with suppress(StorageError):
            write_json(folder / VERIFIED_FILE, stamps)


def _read_verified(folder: Path) -> dict[str, Any]:
    try:
        value = read_cached(folder / VERIFIED_FILE)
    except (OSError, ValueError, RecursionError):
        return {}  # only costs computing the hashes
    return value if isinstance(value, dict) else {}
