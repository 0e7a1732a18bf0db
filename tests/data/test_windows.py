"""Training windows: every token once an epoch, none of the held-out ones ever."""

import numpy as np
import pytest

from lowmem.data.shards import StoredWindows, split_tokens
from lowmem.data.stream import ValidationSet
from lowmem.system.errors import DataError
from tests.data.fake_shards import CountingShards

SEQ_LEN = 16


def make(total=20_000, fraction=0.05, key=1, seq_len=SEQ_LEN):
    shards = CountingShards(total)
    train, held_out = split_tokens(total, seq_len=seq_len, val_fraction=fraction, mode="blocks")
    return StoredWindows(shards, train, seq_len=seq_len, key=key, label="text"), ValidationSet([(shards, held_out)], seq_len=seq_len), train


def epoch_of(windows, epoch):
    count = windows.windows_per_epoch
    return [windows.window(epoch * count + position) for position in range(count)]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_no_training_window_touches_a_held_out_token(epoch):
    windows, validation, _ = make()
    held_out = set(np.concatenate([batch.ravel() for batch in validation.windows()]).tolist())
    assert len(held_out) > 500
    for window in epoch_of(windows, epoch):
        assert len(window) == SEQ_LEN + 1
        assert held_out.isdisjoint(window.tolist())  # all 17, the last target included


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_covers_every_training_token_once_up_to_the_tails(epoch):
    windows, _, regions = make()
    # inputs only: the last target of a window is the first input of the next one
    inputs = np.concatenate([window[:-1] for window in epoch_of(windows, epoch)])
    assert len(np.unique(inputs)) == len(inputs)
    train_tokens = int((regions[:, 1] - regions[:, 0]).sum())
    # a region loses less than two windows: what its length leaves over, and one given up so that the row can move
    assert len(inputs) > train_tokens - 2 * SEQ_LEN * len(regions)


def test_window_borders_move_from_epoch_to_epoch():
    windows, _, _ = make()
    borders = [{int(window[0]) for window in epoch_of(windows, epoch)} for epoch in range(2)]
    assert len(borders[0] & borders[1]) < 0.5 * len(borders[0])


def test_over_epochs_every_training_token_is_seen():
    windows, _, regions = make(total=2000)
    seen = set()
    for epoch in range(200):
        seen.update(np.concatenate(epoch_of(windows, epoch)).tolist())
    train_tokens = {token for start, stop in regions for token in range(start, stop)}
    # regions shorter than nine windows (153 tokens) may keep a tail, which is shorter than a window
    short = sum(1 for start, stop in regions if stop - start < 9 * SEQ_LEN + 1)
    assert len(train_tokens - seen) <= short * (SEQ_LEN - 1)


def test_order_depends_on_the_key_and_not_on_what_was_asked_before():
    first, again, other = make(key=1)[0], make(key=1)[0], make(key=2)[0]
    order = [int(first.window(position)[0]) for position in range(2000)]
    assert [int(again.window(position)[0]) for position in reversed(range(2000))] == order[::-1]
    assert [int(other.window(position)[0]) for position in range(2000)] != order


def test_the_smallest_text_has_one_window():
    windows = StoredWindows(CountingShards(17), np.array([[0, 17]]), seq_len=16, key=0, label="text")
    assert windows.windows_per_epoch == 1
    assert windows.window(5).tolist() == list(range(17))


def test_a_text_shorter_than_a_sequence_is_refused():
    with pytest.raises(DataError, match=r"text has 16 tokens, too few to train on sequences of 16 \(a window needs 17\)"):
        StoredWindows(CountingShards(16), np.array([[0, 16]]), seq_len=16, key=0, label="text")


def test_validation_windows_are_always_the_same_and_evenly_spread():
    _, validation, _ = make()
    everything = np.concatenate(list(validation.windows()))
    assert everything.shape == (len(validation), SEQ_LEN + 1)
    some = np.concatenate(list(validation.windows(10, batch_size=4)))
    assert np.array_equal(some, np.concatenate(list(validation.windows(10, batch_size=3))))
    expected = [number * len(everything) // 10 for number in range(10)]
    assert np.array_equal(some, everything[expected])
    assert [len(batch) for batch in validation.windows(10, batch_size=4)] == [4, 4, 2]
    assert sum(len(batch) for batch in validation.windows(10**6)) == len(validation)


def test_held_out_blocks_are_used_whole():
    # blocks of 2^k + 1 tokens: windows of 16 fill them, so nothing of the held-out text goes unused
    _, validation, regions = make()
    held_out_tokens = 20_000 - int((regions[:, 1] - regions[:, 0]).sum())
    assert len(np.unique(np.concatenate(list(validation.windows())))) >= 0.97 * held_out_tokens
