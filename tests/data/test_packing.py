"""Conversations in rows: nothing lost, nothing doubled, and exactly the policy's cuts."""

import numpy as np
import pytest

from lowmem.data.batch import IGNORE_INDEX
from lowmem.data.chat import Packer, PackingCounts, pack_conversations, truncated
from lowmem.system.errors import DataError

SEQ_LEN = 12


def conversation(number: int, length: int, prompt: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Tokens number * 100, number * 100 + 1, ...; the first `prompt` are the user's."""
    return np.arange(length) + 100 * number, np.arange(length) >= prompt


def test_every_token_is_predicted_once_in_its_own_segment():
    items = [conversation(n, length) for n, length in enumerate((5, 13, 8, 3, 7, 6), start=1)]
    packed = pack_conversations(items, SEQ_LEN)
    batch = packed.batch
    seen = {}
    for row in range(len(batch)):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            inputs, targets = batch.inputs[row][here], batch.targets[row][here]
            assert np.all(np.diff(np.flatnonzero(here)) == 1)
            assert np.array_equal(inputs[1:], np.where(targets[:-1] == IGNORE_INDEX, inputs[1:], targets[:-1]))
            seen[inputs[0] // 100] = (inputs.tolist(), targets.tolist())
    for number, (tokens, said) in enumerate(items, start=1):
        assert seen[number] == (tokens[:-1].tolist(), np.where(said[1:], tokens[1:], IGNORE_INDEX).tolist())
    padding = batch.segments == 0
    assert np.all(batch.targets[padding] == IGNORE_INDEX)
    assert batch.target_count() == sum(int(said[1:].sum()) for _, said in items)
    assert packed.padding_share() == padding.mean() < 0.3


def test_truncation_by_policy_is_counted():
    long, silent, short = conversation(1, 20), conversation(2, 20, prompt=15), conversation(3, 5)
    for policy, used, line in (
        ("cut", [13, 5], "1 longer than 12 tokens were cut there, 1 were left out because no word"),
        ("drop", [5], "2 longer than 12 tokens were left out"),
    ):
        counts = PackingCounts()
        kept = [truncated(item, SEQ_LEN, policy, counts) for item in (long, silent, short)]
        assert [len(item[0]) for item in kept if item is not None] == used
        assert counts.used() == len(used)
        assert line in counts.describe(policy, SEQ_LEN)
    assert PackingCounts(conversations=3).describe("cut", SEQ_LEN) == ""


def test_a_row_takes_one_conversation_where_asked():
    packed = pack_conversations([conversation(n, 4) for n in range(5)], SEQ_LEN, one_per_row=True)
    assert len(packed.batch) == 5
    assert packed.batch.segments.max() == 1


def test_a_full_packer_says_so_and_stays_as_it_was():
    packer = Packer(1, SEQ_LEN)
    assert packer.add(*conversation(1, 10))
    before = packer.batch().inputs.copy()
    assert not packer.add(*conversation(2, 5))
    assert np.array_equal(packer.batch().inputs, before)
    assert packer.add(*conversation(3, 4))


def test_nothing_left_is_refused():
    with pytest.raises(DataError, match="no conversation is left to learn from: of 1 conversations 1 longer than 12"):
        pack_conversations([conversation(1, 30)], SEQ_LEN, "drop")
