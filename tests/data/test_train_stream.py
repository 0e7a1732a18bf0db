"""The mixture and its state."""

import json

import numpy as np
import pytest

from lowmem.data.shards import StoredWindows
from lowmem.data.stream import EndOfData, TrainStream
from lowmem.system.errors import CheckpointError
from tests.data.fake_shards import CountingShards

SEQ_LEN = 8


def make(weights=(3.0, 1.0), totals=(1000, 300), seed=0, seq_len=SEQ_LEN, exhausted="repeat"):
    sources = [
        StoredWindows(CountingShards(total), np.array([[0, total]]), seq_len=seq_len, key=number, label=str(number))
        for number, total in enumerate(totals)
    ]
    return TrainStream(sources, weights, seq_len=seq_len, seed=seed, exhausted=exhausted)


def test_sources_wrap_around_on_their_own():
    stream = make()
    stream.next(2000)  # 1 in 4 is 500 windows from a source of (300 - 8) // 8 = 36
    assert sum(stream.state_dict()["drawn"]) == 2000
    small = stream.state_dict()["drawn"][1]
    assert stream.epochs()[1] == small / 36 > 10
    assert stream.tokens_per_epoch() == SEQ_LEN * ((1000 - 8) // 8 + 36)


def test_resuming_equals_going_on():
    whole = make().next(100)
    assert whole.dtype == np.int64
    assert whole.shape == (100, SEQ_LEN + 1)
    for stop in (0, 1, 37, 99):
        stream = make()
        stream.next(stop)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = make()
        resumed.next(13)  # whatever it did before is forgotten
        resumed.load_state_dict(state)
        assert np.array_equal(resumed.next(100 - stop), whole[stop:])


def test_the_order_does_not_depend_on_how_many_are_taken_at_once():
    stream = make()
    parts = [stream.next(count) for count in (1, 5, 0, 30, 64)]
    assert np.array_equal(np.concatenate(parts), make().next(100))


def test_the_seed_changes_the_order():
    assert not np.array_equal(make(seed=1).next(50), make(seed=2).next(50))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, r"seed was 0, is 1"),
        ({"seq_len": 4}, r"seq_len was 8, is 4"),
        ({"totals": (1000, 400)}, r"windows_per_epoch was \[124, 36\], is \[124, 49\]"),
    ],
)
def test_a_state_of_other_data_is_refused(changed, message):
    state = make().state_dict()
    with pytest.raises(CheckpointError, match=message):
        make(**changed).load_state_dict(state)


def test_a_malformed_state_is_refused():
    state = make().state_dict()
    del state["drawn"]
    with pytest.raises(CheckpointError, match="malformed"):
        make().load_state_dict(state)


@pytest.mark.parametrize("length, rows", [(8, 6), (4, 12), (2, 24), (3, 16)])
def test_shorter_sequences_are_more_of_them_and_the_same_text(length, rows):
    """Six windows of 8 hold 48 tokens at every length; where a length divides 8, they are the very tokens of those windows."""
    windows, batch = make().next(6), make().batch(6, seq_len=length, step=0)
    assert batch.inputs.shape == batch.targets.shape == (rows, length)
    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    if 8 % length == 0:
        assert sorted(batch.inputs.ravel().tolist()) == sorted(windows[:, :-1].ravel().tolist())
        assert sorted(batch.targets.ravel().tolist()) == sorted(windows[:, 1:].ravel().tolist())


def test_a_change_of_length_does_not_change_what_comes_after_it():
    one, other = make(), make()
    one.batch(6, seq_len=8, step=0)
    other.batch(6, seq_len=2, step=0)
    assert np.array_equal(one.next(20), other.next(20))


def test_a_stopped_mixture_gives_each_window_of_the_first_source_once():
    stream = make(weights=(1.0,), totals=(1000,), exhausted="stop")
    windows = stream.next(124)
    assert len(np.unique(windows[:, 0])) == 124
    with pytest.raises(EndOfData):
        stream.next(1)
