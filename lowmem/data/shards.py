"""Token shards, written once and read through a memory map, and their windows: which are held out, in which order the others are seen."""

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np

from lowmem.data.decoding import irregular_kind
from lowmem.data.text_source import DataProgress, ProgressCallback, ignore_progress
from lowmem.system.errors import DataError, StorageError
from lowmem.system.files import file_sha256, malformed, storage_errors, write_json

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
        folder: written by `lowmem.data.prepare.build_shards`.
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


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def keyed_hash(*values: int) -> int:
    """A 64-bit hash of whole numbers, the same on every machine and in every version of Python.

    Source: the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195, chained over the values.
    """
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


class KeyedPermutation:
    """A shuffle of 0..size-1 that computes each element when asked.

    A Feistel network permutes the next power of four; what falls outside is permuted again until it falls inside, which
    takes fewer than four rounds on average.

    Args:
        size: at least 1.
        key: 64 bits; another key is another shuffle.
    Memory: none that grows with `size`.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", doi:10.1007/3-540-45760-7_9 (cycle walking).
    """

    def __init__(self, size: int, key: int):
        if size < 1:
            raise ValueError(f"found size {size}, allowed 1 or more")
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._keys = [keyed_hash(key, number) for number in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """The element at `position`.

        Raises:
            IndexError: `position` is outside 0..size-1.
        """
        if not 0 <= position < self._size:
            raise IndexError(f"found position {position}, allowed 0..{self._size - 1}")
        value = self._permute(position)
        while value >= self._size:
            value = self._permute(value)
        return value

    def __len__(self) -> int:
        return self._size

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (keyed_hash(key, right) & self._half_mask)
        return left << self._half_bits | right


MAX_BLOCK_TOKENS = 32768
_BLOCKS_WANTED = 8
_SPLIT_KEY = 0x6C6F776D656D  # fixed: another seed must not train on what an earlier run validated on


def split_tokens(total: int, *, seq_len: int, val_fraction: float, mode: Literal["blocks", "tail"]) -> tuple[np.ndarray, np.ndarray]:
    """Divide tokens 0..total-1 into regions for training and for validation.

    blocks: the text is cut into blocks of 2^k + 1 tokens, of which about eight or more are held out, chosen by a fixed
    hash of the block's number. `seq_len` matters only where a block would be shorter than a window of it. tail: the
    last `val_fraction` of the tokens.

    Args:
        seq_len: tokens that a window predicts; it reads one more.
        val_fraction: 0 holds nothing out.
    Returns:
        Two (n, 2) arrays of [start, stop), sorted, disjoint, together all tokens. The second is empty if the text is too
        short for a window on each side.
    """
    everything = np.array([[0, total]], dtype=np.int64)
    nothing = np.empty((0, 2), dtype=np.int64)
    if val_fraction == 0 or total < 2 * (seq_len + 1):
        return everything, nothing
    if mode == "tail":
        border = min(int(total * (1 - val_fraction)), total - seq_len - 1)
        return (np.array([[0, border]]), np.array([[border, total]])) if border > seq_len else (everything, nothing)
    block = _block_tokens(total, seq_len, val_fraction)
    blocks = total // block
    count = max(1, round(val_fraction * blocks))
    hashes = np.array([keyed_hash(_SPLIT_KEY, number) for number in range(blocks)], dtype=np.uint64)
    held_out = np.zeros(blocks + 1, dtype=bool)  # one more: what is left after the last whole block is for training
    held_out[np.argsort(hashes, kind="stable")[:count]] = True
    train, validation = _regions(~held_out, block, total), _regions(held_out, block, total)
    if not np.any(train[:, 1] - train[:, 0] > seq_len):
        return everything, nothing
    return train, validation


def _block_tokens(total: int, seq_len: int, val_fraction: float) -> int:
    wanted = min(max(1, int(total * val_fraction / _BLOCKS_WANTED)), MAX_BLOCK_TOKENS)
    # one more than a power of two: then whole windows of a power-of-two length, and the target after them, fill the block
    block = (1 << (wanted.bit_length() - 1)) + 1
    return block if block > seq_len else seq_len + 1


def _regions(chosen: np.ndarray, block: int, total: int) -> np.ndarray:
    """Runs of True among the blocks, as token positions."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
    regions = np.minimum(edges.reshape(-1, 2) * block, total)
    return regions[regions[:, 1] > regions[:, 0]]


_MANY_WINDOWS = 8
_ORDER, _OFFSET = 1, 2  # what a hash is for


class WindowSource(Protocol):
    """Windows of one source, for `lowmem.data.stream.TrainStream`."""

    label: str

    @property
    def windows_per_epoch(self) -> int | None:
        """Windows of one pass; None if nobody knows."""

    def window(self, drawn: int) -> np.ndarray:
        """(seq_len + 1,) int64, for a source of which `drawn` windows were taken before."""

    def state_dict(self) -> dict[str, Any]:
        """What beyond the number of windows drawn is needed to go on; JSON-ready."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


class StoredWindows:
    """Windows in shuffled order, epoch after epoch; everything follows from (seed, epoch, position).

    Windows never cross the border of a region, not even with their last target. Within a region they lie end to end, each
    one's last target being the next one's first input, and where the row of windows begins moves from epoch to epoch.

    Args:
        regions: (n, 2) token positions [start, stop) that may be read.
        seq_len: tokens that a window predicts.
        key: 64 bits from the seed and the source's number.
    Raises:
        DataError: no region is as long as a window.
    Memory: two numbers a region.
    """

    def __init__(self, shards: TokenShards, regions: np.ndarray, *, seq_len: int, key: int, label: str):
        self.label = label
        self._shards = shards
        self._seq_len = seq_len
        self._key = key
        lengths = regions[:, 1] - regions[:, 0]
        self._starts = regions[:, 0]
        counts = windows_in(lengths, seq_len)
        # giving up one window of many lets the row begin anywhere within a window's length
        self._counts = np.where(counts > _MANY_WINDOWS, (lengths - seq_len) // seq_len, counts)
        self._slack = np.maximum(lengths - 1 - self._counts * seq_len, 0)
        self._ends = np.cumsum(self._counts)
        self.windows_per_epoch = int(self._ends[-1]) if len(regions) else 0
        if not self.windows_per_epoch:
            raise DataError(
                f"{label} has {len(shards)} tokens, too few to train on sequences of {seq_len} (a window needs {seq_len + 1}); "
                "give more text, or lower data.seq_len"
            )
        self._epoch = -1
        self._permutation = KeyedPermutation(1, 0)

    def window(self, drawn: int) -> np.ndarray:
        epoch, position = divmod(drawn, self.windows_per_epoch)
        return self._shards.read(self.window_start(epoch, position), self._seq_len + 1)

    def window_start(self, epoch: int, position: int) -> int:
        """First token of the window at `position` of an epoch."""
        if epoch != self._epoch:
            self._permutation = KeyedPermutation(self.windows_per_epoch, keyed_hash(self._key, _ORDER, epoch))
            self._epoch = epoch
        number = self._permutation[position]
        region = int(np.searchsorted(self._ends, number, side="right"))
        within = number - int(self._ends[region] - self._counts[region])
        choices = min(int(self._slack[region]), self._seq_len - 1) + 1
        offset = keyed_hash(self._key, _OFFSET, epoch, region) % choices
        return int(self._starts[region]) + offset + within * self._seq_len

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the order is a function."""


def windows_in(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """How many windows of seq_len + 1 tokens, sharing one with the next, lie in regions of these lengths."""
    return np.maximum(lengths - 1, 0) // seq_len
