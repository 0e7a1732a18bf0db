"""Nothing is held out and trained on at once, and the share is as asked."""

import numpy as np
import pytest

from lowmem.data.shards import split_tokens


def as_set(regions: np.ndarray) -> set[int]:
    return {token for start, stop in regions for token in range(start, stop)}


@pytest.mark.parametrize("mode", ["blocks", "tail"])
@pytest.mark.parametrize("total", [34, 100, 1000, 33_333])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_two_sides_are_disjoint_and_complete(mode, total, fraction):
    train, held_out = split_tokens(total, seq_len=16, val_fraction=fraction, mode=mode)
    assert as_set(train) | as_set(held_out) == set(range(total))
    assert len(as_set(train)) + len(as_set(held_out)) == total
    assert (np.diff(train.ravel()) > 0).all()
    assert (held_out[:, 1] - held_out[:, 0] > 16).any()
    assert (train[:, 1] - train[:, 0] > 16).any()


def test_whole_blocks_are_held_out_and_the_share_is_met():
    total, fraction = 1_000_000, 0.02
    _, held_out = split_tokens(total, seq_len=128, val_fraction=fraction, mode="blocks")
    # a block has 2^k + 1 tokens, the largest with 8 blocks in the 20 000 held-out tokens: 2500 -> 2048 + 1
    assert set((held_out[:, 1] - held_out[:, 0]) % 2049) == {0}
    held = int((held_out[:, 1] - held_out[:, 0]).sum())
    assert abs(held - fraction * total) <= 2049 / 2 + 2049 * fraction  # rounded to whole blocks, of those that are whole
    assert len(held_out) > 4  # spread, not in one piece
    assert held_out[0, 0] > 0 or held_out[-1, 1] < total


def test_the_split_does_not_depend_on_the_sequence_length_where_blocks_are_longer():
    splits = [split_tokens(1_000_000, seq_len=seq_len, val_fraction=0.02, mode="blocks")[1] for seq_len in (32, 128, 2048)]
    assert all(np.array_equal(split, splits[0]) for split in splits)


def test_tail_is_the_classic_split():
    train, held_out = split_tokens(1_115_394, seq_len=256, val_fraction=0.1, mode="tail")
    assert train.tolist() == [[0, 1_003_854]]
    assert held_out.tolist() == [[1_003_854, 1_115_394]]


@pytest.mark.parametrize("mode", ["blocks", "tail"])
def test_too_short_for_both_sides_holds_nothing_out(mode):
    train, held_out = split_tokens(33, seq_len=16, val_fraction=0.1, mode=mode)
    assert train.tolist() == [[0, 33]]
    assert len(held_out) == 0
    train, held_out = split_tokens(34, seq_len=16, val_fraction=0.1, mode=mode)
    assert len(as_set(held_out)) == 17


def test_nothing_is_held_out_of_fraction_0():
    assert len(split_tokens(10_000, seq_len=16, val_fraction=0, mode="blocks")[1]) == 0
