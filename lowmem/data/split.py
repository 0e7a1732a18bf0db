"""Which tokens are held out for validation: a function of the text's length alone, so that it never changes between runs."""

from typing import Literal

import numpy as np

from lowmem.data.order import keyed_hash

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
