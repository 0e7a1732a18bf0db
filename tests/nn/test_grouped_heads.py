"""Heads of keys and values that several query heads share: what they compute, with a cache and without, and what is refused."""

import pytest
import torch

from lowmem.config.checks import config_problems
from lowmem.config.schema import LorptConfig, ModelConfig, RunConfig
from lowmem.models.registry import build_model
from lowmem.system.errors import ConfigError

SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48}


def make_model(seed: int = 0, **choices):
    return build_model(ModelConfig(**(SHAPE | choices)), vocab_size=64, max_seq_len=32, seed=seed, dtype=torch.float64)


def tokens() -> torch.Tensor:
    return torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_it_is_full_attention_with_equal_heads(positions):
    """The same weights with every head of keys and values written out once per query head that uses it."""
    grouped, full = make_model(positions=positions, num_kv_heads=2), make_model(1, positions=positions)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith("qkv.weight"):
            q, k, v = weight.split((32, 16, 16))
            k, v = (part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))
            weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    assert torch.allclose(grouped(tokens()), full(tokens()), rtol=0, atol=1e-12)
    assert 2 * grouped.new_cache(2, 32).nbytes() == full.new_cache(2, 32).nbytes()


def test_a_cache_changes_nothing():
    model = make_model(num_kv_heads=1).eval()
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in tokens().split((7, 1, 12), 1)]
        assert torch.allclose(torch.cat(pieces, 1), model(tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["block", "selective", "low_rank"])
def test_gradients_do_not_depend_on_recomputation(mode):
    gradients = []
    for each in ("none", mode):
        model = make_model(num_kv_heads=2, lorpt=LorptConfig(rank=4))
        model.activation_checkpointing = each
        model(tokens(), tokens()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_does_not_divide_is_refused():
    problems = config_problems(RunConfig(model=ModelConfig(num_heads=4, num_kv_heads=3)))
    assert "model.num_kv_heads is 3, must divide model.num_heads (4), or be 0 for as many" in problems
    with pytest.raises(ConfigError, match="model.num_kv_heads is 2, but model.attention_rank is 8"):
        make_model(num_kv_heads=2, attention_rank=8)
