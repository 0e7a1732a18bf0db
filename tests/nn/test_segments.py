"""A packed row computes what its conversations compute in rows of their own, in forward and backward."""

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.data.chat import pack_conversations
from lowmem.models.registry import build_model
from lowmem.nn.positions import segment_positions

SEQ_LEN, VOCAB = 96, 50
LENGTHS = (40, 97, 20, 33, 61, 9)


def conversations() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(random.integers(1, VOCAB, length), np.arange(length) > 3) for length in LENGTHS]


def tensors(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), torch.from_numpy(batch.segments)


def test_positions_begin_anew_with_each_segment():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0]])
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0]]


@pytest.mark.parametrize(
    "choices",
    [
        {"positions": "rope"},
        {"positions": "alibi"},
        {"positions": "learned"},
        {"positions": "rope", "attention_rank": 8},
        {"name": "i3", "num_heads": 1, "attention_rank": 8, "lorpt": LorptConfig(rank=8)},
    ],
    ids=["rope", "alibi", "learned", "low-rank", "i3"],
)
def test_packed_equals_separate(choices):
    """In fp64, where rope's other absolute angles and other orders of sums change 1e-12 of a number of order 1."""
    config = ModelConfig(**{"dim": 32, "num_layers": 2, "num_heads": 4, **choices})
    model = build_model(config, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=torch.float64)
    one_per_row = not model.keeps_segments_apart
    packed = pack_conversations(conversations(), SEQ_LEN, one_per_row=one_per_row).batch
    assert (packed.segments.max() > 1) != one_per_row
    apart = [pack_conversations([item], len(item[0]) - 1).batch for item in conversations()]
    inputs, targets, segments = tensors(packed)
    loss = model(inputs, targets, 1.0, segments_BT=segments)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    separate = sum(model(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets), 1.0) for batch in apart)
    expected = torch.autograd.grad(separate, list(model.parameters()))
    assert abs(loss.item() - separate.item()) < 1e-10 * separate.item()
    for found, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_no_conversation_sees_another(positions):
    """Changing every token of one conversation leaves the logits of the others in its row as they were, to the bit."""
    config = ModelConfig(dim=32, num_layers=2, num_heads=4, positions=positions)
    model = build_model(config, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0)
    inputs, _, segments = tensors(pack_conversations(conversations(), SEQ_LEN).batch)
    row = int((segments.max(1).values > 1).nonzero()[0, 0])
    changed = inputs.clone()
    changed[row, segments[row] == 1] = (changed[row, segments[row] == 1] + 7) % VOCAB
    with torch.no_grad():
        before, after = (model(tokens, segments_BT=segments)[row] for tokens in (inputs, changed))
    others = segments[row] > 1
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_a_recurrent_model_refuses_two_in_a_row():
    config = ModelConfig(name="i3", dim=32, num_layers=1, num_heads=1, attention_rank=8, lorpt=LorptConfig(rank=8))
    model = build_model(config, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0)
    inputs, targets, segments = tensors(pack_conversations(conversations(), SEQ_LEN).batch)
    with pytest.raises(ValueError, match="one segment a row"):
        model(inputs, targets, segments_BT=segments)
