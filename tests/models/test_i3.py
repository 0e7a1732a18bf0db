import pytest
import torch
import torch.nn.functional as F

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.i3 import resolve_i3
from lowmem.models.registry import build_model
from lowmem.system.errors import ConfigError

V, T = 29, 40


def small(**fields):
    fields = {"name": "i3", "dim": 32, "num_layers": 2, "attention_rank": 4, "lorpt": LorptConfig(rank=4), **fields}
    return build_model(ModelConfig(**fields), vocab_size=V, max_seq_len=T, seed=0)


def tokens(seed=1):
    return torch.randint(0, V, (3, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layers,total", [(12, 12_691_186), (24, 22_640_626)])
def test_published_parameter_counts(layers, total):
    model = build_model(ModelConfig(name="i3", dim=512, num_layers=layers), vocab_size=4466, max_seq_len=256, seed=0)
    assert model.num_parameters() == total
    assert model.component_parameters() == {
        "embedding": 2_286_592,
        "positions": 131_072,
        "hybrid": layers * 34_816,
        "attention": layers * 460_992,
        "mlp": layers * 330_240,
        "norm": layers * 3_072 + 1_024,
        "head": 323_058,
    }


def test_loss_is_that_of_the_logits_and_decoding_equals_training():
    model, inputs, targets = small(), tokens(), tokens(2)
    with torch.no_grad():
        logits = model(inputs)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 120
        assert model(inputs, targets, 120.0).item() == pytest.approx(expected.item(), abs=4e-5)  # 120 * 2^-24 * 3.4
        cache = model.new_cache(3, T)
        pieces = [model(inputs[:, :17], cache=cache)] + [model(inputs[:, i : i + 1], cache=cache) for i in range(17, T)]
        # logits of size 0.5 after sums of up to 128 products: 4e-6
        torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=0, atol=4e-6)
    # 3 sequences, 2 layers: 2 * 4 latents for 40 tokens, and 32 + 32 recurrent numbers
    assert cache.nbytes() == 3 * 2 * (40 * 2 * 4 + 32 + 32) * 4


def test_nothing_comes_from_the_future():
    model, inputs = small(), tokens()
    changed = inputs.clone()
    changed[:, 20] = (changed[:, 20] + 1) % V
    with torch.no_grad():
        before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputation_changes_no_bit_of_the_gradients(mode):
    model, inputs, targets = small(), tokens(), tokens(2)
    results = []
    for choice in ("none", mode):
        model.activation_checkpointing = choice
        loss = model(inputs, targets, 120.0)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bf16_autocast():
    model, inputs, targets = small(), tokens(), tokens(2)
    exact = model(inputs, targets, 120.0).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs, targets, 120.0)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=2e-3)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_runs_without_data():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = small()
        fake = torch.zeros(2, T, dtype=torch.int64)
        model(fake, fake, 80.0).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_sequences_end_with_the_positions():
    with pytest.raises(ConfigError, match=r"sequence of 41 tokens.*max_seq_len = 40"):
        small()(torch.zeros(1, T + 1, dtype=torch.int64))


def test_fields_that_i3_does_not_have_are_refused_together():
    wrong = {"positions": "alibi", "num_heads": 2, "tie_embeddings": True, "rope_theta": 500.0}
    with pytest.raises(ConfigError) as error:
        small(**wrong, lorpt=LorptConfig(rank=4, targets=["attention"]))
    for name in (*wrong, "lorpt.targets"):
        assert f"model.{name} is " in str(error.value)
    assert "i3 has learned" in str(error.value)


def test_defaults_and_own_values_are_accepted():
    own = ModelConfig(name="i3", num_heads=1, positions="learned", norm="layernorm", activation="gelu")
    own.lorpt.targets = ["mlp", "head"]
    assert resolve_i3(own) == resolve_i3(ModelConfig(name="i3"))


def test_ranks_by_pattern():
    model = small(lorpt=LorptConfig(rank=4, ranks={"blocks.0.mlp.*": 0, "head": 8}))
    assert model.blocks[0].mlp.up.weight.shape == (128, 32)
    assert model.blocks[1].mlp.up.rank == 4
    assert model.head.rank == 8
    with pytest.raises(ConfigError, match=r"\*\.gate.*blocks\.0\.mlp\.up"):
        small(lorpt=LorptConfig(rank=4, ranks={"*.gate": 2}))


def test_flops_per_token():
    model = build_model(ModelConfig(name="i3", dim=512, num_layers=12), vocab_size=4466, max_seq_len=256, seed=0)
    matrices = 12 * (32 * 32 + 2 * 32 * 512 + 6 * 64 * 512 + 512 * 512 + 2 * 64 * 2560) + 64 * (512 + 4466)
    assert model.flops_per_token(256) == 6 * matrices + 12 * (6 * 512 * 257 + 18 * 512)
