"""The mixture and its state."""

import json
from collections import Counter

import numpy as np
import pytest

from lowmem.data.train_stream import Mixture, TrainStream
from lowmem.data.windows import StoredWindows
from lowmem.errors import CheckpointError
from tests.data.fake_shards import CountingShards

SEQ_LEN = 8


def make(weights=(3.0, 1.0), totals=(1000, 300), seed=0, seq_len=SEQ_LEN):
    sources = [
        StoredWindows(CountingShards(total), np.array([[0, total]]), seq_len=seq_len, key=number, label=str(number))
        for number, total in enumerate(totals)
    ]
    return TrainStream(sources, weights, seq_len=seq_len, seed=seed)


def test_shares_match_the_weights():
    draws, weights = 20_000, (5.0, 3.0, 2.0)
    mixture = Mixture(weights, seed=7)
    counts = Counter(mixture.source_at(position) for position in range(draws))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        # five standard deviations of a binomial: one failure in about 10^6 seeds, and the seed is fixed
        assert abs(counts[number] - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5


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


def test_weights_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        Mixture([1.0, 0.0], seed=0)
