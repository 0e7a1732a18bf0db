"""Decoding through a cache against the whole sequence at once, for every kind of position, beyond the training length, and row by row."""

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.registry import build_model

TRAINED, LONGER = 12, 30
I3 = {"name": "i3", "attention_rank": 4, "state_dim": 8, "num_heads": 1, "lorpt": LorptConfig(rank=4)}
MODELS = {
    "rope": {}, "alibi": {"positions": "alibi"}, "learned": {"positions": "learned"}, "low_rank": {"attention_rank": 4},
    "low_rank_alibi": {"attention_rank": 4, "positions": "alibi"}, "i3": I3,
}  # fmt: skip
# Logits of size 0.5 after 2 blocks of sums of up to 128 products, in another order: 128 * 0.5 * 2^-24 = 4e-6
TOLERANCE = 4e-6


def make(name):
    fields = {"dim": 32, "num_layers": 2, "num_heads": 4, **MODELS[name]}
    return build_model(ModelConfig(**fields), vocab_size=64, max_seq_len=TRAINED, seed=0).eval()


def text(batch, time):
    return torch.randint(0, 64, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cached_logits_and_greedy_tokens_are_those_of_the_whole_sequence(name):
    model, beyond = make(name), name not in ("learned", "i3")
    length = LONGER if beyond else TRAINED
    inputs = text(2, length)
    whole = model(inputs)
    cache = model.new_cache(2, length)
    pieces = [model(inputs[:, :5], cache=cache)] + [model(inputs[:, i : i + 1], cache=cache) for i in range(5, length)]
    cached = torch.cat(pieces, 1)
    torch.testing.assert_close(cached, whole, rtol=0, atol=TOLERANCE)
    best = whole.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * TOLERANCE  # nearer ones may change places
    assert clear.float().mean() > 0.9
    assert torch.equal(cached.argmax(-1)[clear], whole.argmax(-1)[clear])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sequences_of_different_lengths_are_decoded_as_if_alone(name):
    model, inputs, held = make(name), text(3, TRAINED), (2, 7, 4)
    together, alone = model.new_cache(3, TRAINED), [model.new_cache(1, TRAINED) for _ in held]
    for row, length in enumerate(held):
        model(inputs[row : row + 1, :length], cache=together.rows(row, row + 1))
        model(inputs[row : row + 1, :length], cache=alone[row])
    assert (together.lengths.tolist(), together.length, together.start) == ([2, 7, 4], 7, held)
    for step in range(3):
        tokens = torch.stack([inputs[row, length + step] for row, length in enumerate(held)]).unsqueeze(1)
        found = model(tokens, cache=together)
        for row in range(3):
            expected = model(tokens[row : row + 1], cache=alone[row])
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=TOLERANCE)
    together.keep([0, 2])
    left = together.rows(0, 2)
    assert left.lengths.tolist() == [5, 7]
    found = model(inputs[:2, -1:], cache=left)
    torch.testing.assert_close(found[1:], model(inputs[1:2, -1:], cache=alone[2]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_row_that_is_reset_remembers_nothing(name):
    model, inputs = make(name), text(2, 6)
    cache, fresh = model.new_cache(2, TRAINED), model.new_cache(1, TRAINED)
    model(inputs, cache=cache)
    cache.rows(1, 2).reset()
    assert cache.lengths.tolist() == [6, 0]
    assert torch.equal(model(inputs[:1], cache=cache.rows(1, 2)), model(inputs[:1], cache=fresh))
    cache.reset()
    assert np.array_equal(cache.lengths, [0, 0])
