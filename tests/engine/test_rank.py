"""Changing the rank of a model between steps of an engine."""

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.models.registry import build_model
from lowmem.system.errors import ConfigError

VOCAB, SEQ_LEN = 61, 16
CPU = torch.device("cpu")


def make_engine(rank=2, update="accumulate", bottleneck="linear", **optim):
    lorpt = LorptConfig(rank=rank, targets=["attention", "mlp"], ranks={"blocks.1.mlp.down": 6}, bottleneck=bottleneck)
    model = build_model(ModelConfig(dim=32, num_layers=2, num_heads=2, lorpt=lorpt), vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0)
    config = OptimConfig(**{"lr": 1e-2, "state_bits": 8, **optim})
    if update == "layerwise":
        train = TrainConfig(update=update, seed=0)
        return LayerwiseEngine(model, config, train, device=CPU, precision="fp32", micro_batch_size=4), lorpt
    return LocalEngine(model, config, device=CPU, precision="fp32", micro_batch_size=4), lorpt


def batch(seed):
    """Each token follows from the one three before it: what attention carries there must tell many tokens apart, which rank 1 cannot."""
    rows = np.random.default_rng(seed).integers(0, VOCAB, (8, SEQ_LEN + 1))
    following = np.random.default_rng(0).permutation(VOCAB)
    for column in range(3, SEQ_LEN + 1):
        rows[:, column] = following[rows[:, column - 3]]
    return Batch.from_windows(rows)


@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
@pytest.mark.parametrize("name", ["adamw", "lion", "spectron"])
@pytest.mark.parametrize("bottleneck", ["linear", "silu"])
def test_growing_leaves_the_loss_and_shrinking_back_nearly(update, name, bottleneck):
    engine, lorpt = make_engine(4, update, bottleneck, name=name)
    for seed in range(4):
        engine.step(batch(seed), 1e-2)
    held_out = [batch(99)]
    before = engine.evaluate(held_out)
    engine.set_rank(12, lorpt.ranks, seed=1, step=0)
    # zeros are added to sums of the same numbers, which vectorised kernels group otherwise: 64 roundings of a loss of about 4
    assert engine.evaluate(held_out) == pytest.approx(before, abs=64 * 4 * 2**-24)
    engine.set_rank(4, lorpt.ranks, seed=2, step=0)
    # the same product from other factors (linear), or the same factors again (silu: added columns have no weight)
    assert engine.evaluate(held_out) == pytest.approx(before, abs=2000 * 4 * 2**-24)
    for seed in range(4, 8):
        assert np.isfinite(engine.step(batch(seed), 1e-2).loss)
    assert engine.model.blocks[1].mlp.down.rank == 6  # named by a pattern: has a rank of its own


def test_a_grown_model_ends_below_one_that_was_not():
    losses = {}
    for grown in (False, True):
        engine, lorpt = make_engine(1, name="spectron", state_bits=32)
        for seed in range(200):
            if grown and seed == 60:
                engine.set_rank(12, lorpt.ranks, seed=1, step=0)
            engine.step(batch(seed), 2e-2)
        losses[grown] = engine.evaluate([batch(1000 + n) for n in range(4)])
    assert losses[True] < losses[False] - 0.5


def test_growing_is_a_function_of_its_seed():
    weights = []
    for seed in (1, 1, 2):
        engine, lorpt = make_engine()
        engine.set_rank(8, lorpt.ranks, seed=seed, step=0)
        weights.append(engine.model.blocks[0].attention.out.down.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_checkpoint_brings_its_ranks(tmp_path):
    engine, lorpt = make_engine()
    engine.step(batch(0), 1e-2)
    engine.set_rank(8, lorpt.ranks, seed=1, step=0)
    engine.step(batch(1), 1e-2)
    state = engine.save(tmp_path)
    other, _ = make_engine()
    other.load(tmp_path, state)
    results = [(e.step(batch(2), 1e-2).loss, e.evaluate([batch(3)])) for e in (engine, other)]
    assert results[0] == results[1]


def test_a_rank_that_saves_nothing_is_refused_and_nothing_changes():
    engine, lorpt = make_engine()
    before = engine.evaluate([batch(0)])
    with pytest.raises(ConfigError, match=r"asks for 16, layer blocks\.0\.attention\.qkv\.q .* below .* 16\.0"):
        engine.set_rank(16, lorpt.ranks, seed=1, step=0)
    assert engine.evaluate([batch(0)]) == before
