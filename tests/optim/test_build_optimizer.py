"""Which parameters decay, which library serves, and the norm of gradients."""

import importlib

import pytest
import torch
from torch import nn

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig
from lowmem.models.registry import build_model
from lowmem.optim import AdamW, Lion
from lowmem.optim.clipping import clip_gradients, global_norm
from lowmem.optim.from_config import build_optimizer, decay_groups
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.errors import ConfigError


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_only_matrices_decay():
    model = Tiny()
    decayed, rest = decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 5  # embedding, linear bias, norm weight and bias, scale


def decay_by_name(config: ModelConfig) -> dict[str, float]:
    """Weight decay of every parameter of a model, by the parameter's name."""
    model = build_model(config, vocab_size=19, max_seq_len=12, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = decay_groups(model, 0.1)
    found = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)  # each exactly once
    return found


DECAYED_DECODER = {"attention.qkv.weight", "attention.out.weight", "mlp.gate_up.weight", "mlp.down.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_learned_positions_of_a_decoder_do_not_decay(tied):
    decay = decay_by_name(ModelConfig(dim=16, num_layers=2, num_heads=2, positions="learned", tie_embeddings=tied))
    assert decay["embedding.weight"] == decay["positions.weight"] == decay["norm.weight"] == 0.0
    expected = {f"blocks.{layer}.{name}" for layer in range(2) for name in DECAYED_DECODER} | (set() if tied else {"head.weight"})
    assert {name for name, value in decay.items() if value} == expected


def test_embedding_and_learned_positions_of_i3_do_not_decay():
    decay = decay_by_name(ModelConfig(name="i3", dim=16, num_layers=2, attention_rank=4, state_dim=4, lorpt=LorptConfig(rank=4)))
    assert decay["embedding.weight"] == decay["positions.weight"] == 0.0
    assert decay["head.down"] == decay["head.up"] == 0.05
    assert all(value == 0.0 for name, value in decay.items() if name.endswith("bias") or "norm" in name)


CHOICES = [
    # name, bits, dtype of the weights, other arguments, the class
    ("adamw", 32, torch.float32, {}, torch.optim.AdamW),
    ("adamw", 32, torch.bfloat16, {}, AdamW),
    ("adamw", 32, torch.float32, {"partial": True}, AdamW),
    ("adamw", 8, torch.float32, {}, AdamW),
    ("adamw", 4, torch.bfloat16, {}, AdamW),
    ("adamw", 8, torch.float32, {"offload": True}, AdamW),
    ("lion", 32, torch.bfloat16, {}, Lion),
    ("lion", 32, torch.float32, {"partial": True}, Lion),
    ("lion", 8, torch.float32, {}, Lion),
]


def steps(optimizer: torch.optim.Optimizer, model: Tiny, dtype: torch.dtype) -> bool:
    """Whether a step changes the weights."""
    before = model.linear.weight.detach().clone()
    model.linear(torch.ones(2, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    return not torch.equal(before, model.linear.weight)


@pytest.mark.parametrize("name, bits, dtype, arguments, kind", CHOICES)
def test_each_choice_gives_its_optimizer_and_steps(name, bits, dtype, arguments, kind):
    model = Tiny().to(dtype)
    config = OptimConfig(name=name, state_bits=bits, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(model, config, seed=7, **arguments)
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.8, 0.95), 0.2)
    assert group.get("eps", 1e-6) == 1e-6
    if isinstance(optimizer, LowBitOptimizer):
        assert (optimizer.seed, group["state_bits"]) == (7, bits)
    assert steps(optimizer, model, dtype)


def test_lion_with_32_bits_is_lion_pytorchs():
    library = pytest.importorskip("lion_pytorch")
    model = Tiny()
    optimizer = build_optimizer(model, OptimConfig(name="lion", lr=0.1))
    assert type(optimizer) is library.Lion
    assert steps(optimizer, model, torch.float32)


@pytest.mark.parametrize("name, class_name", [("adamw", "AdamW8bit"), ("lion", "Lion8bit")])
def test_bitsandbytes_is_used_when_it_is_asked_for(name, class_name):
    library = pytest.importorskip("bitsandbytes")
    model = Tiny()
    optimizer = build_optimizer(model, OptimConfig(name=name, state_bits=8, backend="bitsandbytes", lr=0.1))
    assert type(optimizer) is getattr(library.optim, class_name)
    assert steps(optimizer, model, torch.float32)


def test_a_missing_library_names_its_extra(monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"pip install 'lowmem\[lion\]'"):
        build_optimizer(Tiny(), OptimConfig(name="lion"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_global_norm_equals_the_norm_of_the_concatenation(dtype):
    torch.manual_seed(0)
    tensors = [torch.randn(1000, 1200).to(dtype), torch.randn(3).to(dtype), torch.randn(40, 30).to(dtype).t()]
    expected = torch.cat([t.double().reshape(-1) for t in tensors]).norm().item()
    # n = 1.2 million squares summed in fp64 err by at most n * 2^-53 = 1.4e-10 relative, on both sides
    assert global_norm(tensors).item() == pytest.approx(expected, rel=3e-10)
    assert global_norm([]).item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_global_norm_sees_one_bad_element(bad):
    tensors = [torch.ones(2_000_000, dtype=torch.bfloat16), torch.ones(5)]
    tensors[0][1_999_999] = bad
    assert not torch.isfinite(global_norm(tensors))


def test_clipping_scales_only_what_is_too_long():
    gradients = [torch.full((4,), 3.0), torch.full((4,), 4.0)]  # norm 10
    clip_gradients(gradients, 10.0, 20.0)
    clip_gradients(gradients, 10.0, 0.0)
    assert gradients[0].tolist() == [3.0] * 4
    clip_gradients(gradients, 10.0, 5.0)
    assert gradients[1].tolist() == [2.0] * 4
