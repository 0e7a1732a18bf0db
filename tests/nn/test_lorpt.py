import re

import pytest
import torch

from lowmem.config.schema import LorptConfig
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import LinearFactory, LoRPtLinear, lorpt_rank, make_linear
from lowmem.system.errors import ConfigError


@pytest.mark.parametrize("shape", [(5, 9, 3), (512, 2048, 64)])
def test_parameter_count(shape):
    features_in, features_out, rank = shape
    count = sum(p.numel() for p in LoRPtLinear(features_in, features_out, rank).parameters())
    assert count == rank * (features_in + features_out) + features_out


def test_published_example():
    layer = LoRPtLinear(2048, 8192, rank=128, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 1_310_720
    assert 2048 * 8192 == 16_777_216


def test_full_rank_factors_of_a_dense_layer_compute_the_dense_layer():
    # the smallest rank that reaches the full rank of a (12, 3) matrix is 3; it saves nothing, so the factors are placed by hand
    torch.manual_seed(0)
    dense = torch.randn(12, 3, dtype=torch.float64)
    layer = LoRPtLinear(3, 12, rank=2, bias=False).double()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    layer.up = torch.nn.Parameter(left * values)
    layer.down = torch.nn.Parameter(right)
    x = torch.randn(5, 3, dtype=torch.float64)
    # SVD and two products of 3 terms: about 100 roundings of 2^-53 on numbers below 10
    torch.testing.assert_close(layer(x), x @ dense.t(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("bottleneck", ["linear", "silu"])
def test_gradcheck_and_saved_memory(bottleneck):
    layer = LoRPtLinear(6, 8, rank=2, bottleneck=bottleneck).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = (layer.down, layer.up, layer.bias)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *weights))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    own = {weight.data_ptr() for weight in weights}
    activations = sum(t.numel() for key, t in saved.items() if key not in own)
    # input and the (tokens, rank) activation; never anything of (out, in), and for silu only what it was applied to
    assert activations == 5 * 6 + 5 * 2


def test_merged_weight():
    layer = LoRPtLinear(6, 8, rank=2, bias=False).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    # products of 6 and 2 terms in another order: 12 * 2^-53 of numbers below 10
    torch.testing.assert_close(x @ layer.merged_weight().t(), layer(x), rtol=0, atol=1e-13)
    with pytest.raises(ConfigError, match="bottleneck=silu.*cannot be merged"):
        LoRPtLinear(6, 8, rank=2, bottleneck="silu").merged_weight()


def test_checkpoints_of_the_original_layer_load():
    layer = LoRPtLinear(6, 8, rank=2)
    original = {"lora_A": torch.randn(8, 2), "lora_B": torch.randn(2, 6), "bias": torch.randn(8)}
    model = torch.nn.ModuleDict({"layer": layer})
    model.load_state_dict({f"layer.{name}": value for name, value in original.items()})
    x = torch.randn(3, 6)
    expected = x @ (original["lora_A"] @ original["lora_B"]).t() + original["bias"]
    # sums of at most 12 products of numbers of size 1..10: 12 * 10 * 2^-24 = 7e-6
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 4, 5])
def test_a_rank_that_saves_nothing_is_refused_with_the_break_even(rank):
    # 6 * 12 / (6 + 12) = 4
    with pytest.raises(ConfigError, match=rf"12x6 layer is {rank},.*4\.0"):
        LoRPtLinear(6, 12, rank=rank)


def test_initial_variance():
    torch.manual_seed(0)
    original = LoRPtLinear(400, 400, rank=64, init="original")
    # 25,600 draws: relative error of the estimate 0.44 %, five of them 2.2 %
    assert original.down.std().item() == pytest.approx(0.02, rel=0.022)
    assert original.up.std().item() == pytest.approx(0.02, rel=0.022)
    preserved = LoRPtLinear(400, 400, rank=64, dense_std=0.05)
    # the product has about 2 * 25,600 free numbers behind it: 5 / sqrt(2 * 25600) = 2.2 %, twice for the two factors
    assert preserved.merged_weight().std().item() == pytest.approx(0.05, rel=0.044)


def test_ranks_by_pattern():
    lorpt = LorptConfig(rank=16, targets=["mlp"], ranks={"blocks.0.*": 0, "*.down": 8})
    assert lorpt_rank(lorpt, "mlp", "blocks.0.mlp.down") == 0
    assert lorpt_rank(lorpt, "mlp", "blocks.1.mlp.down") == 8
    assert lorpt_rank(lorpt, "mlp", "blocks.1.mlp.gate_up.gate") == 16
    assert lorpt_rank(lorpt, "attention", "blocks.1.attention.out") == 0
    dense = make_linear(64, 64, False, group="mlp", name="blocks.0.mlp.down", lorpt=lorpt)
    factored = make_linear(64, 64, False, group="mlp", name="blocks.1.mlp.down", lorpt=lorpt)
    assert type(dense) is Linear
    assert factored.rank == 8


def test_a_refused_rank_names_its_layer():
    lorpt = LorptConfig(rank=32)
    with pytest.raises(ConfigError, match=r"blocks\.3\.mlp\.up.*is 32.*32\.0"):
        make_linear(64, 64, False, group="mlp", name="blocks.3.mlp.up", lorpt=lorpt)


def test_a_pattern_without_a_match_is_refused():
    factory = LinearFactory(LorptConfig(rank=4, ranks={"*.down": 4, "layers.*": 0}))
    factory.linear(64, 64, False, group="mlp", name="blocks.0.mlp.down")
    with pytest.raises(ConfigError, match=re.escape("ranks has layers.*, which matches no layer") + ".*blocks.0.mlp.down"):
        factory.check_patterns()


def test_a_group_is_fused_only_when_all_of_it_is_dense():
    outputs = {"q": 32, "k": 32, "v": 32}
    x = torch.randn(2, 32)
    fused = LinearFactory(LorptConfig()).split(32, outputs, False, group="attention", name="qkv")
    assert type(fused) is Linear
    mixed = LinearFactory(LorptConfig(targets=["attention"], ranks={"*.v": 4})).split(32, outputs, False, group="attention", name="qkv")
    assert [type(layer) for layer in mixed.children()] == [Linear, Linear, LoRPtLinear]
    assert [tuple(y.shape) for y in mixed(x)] == [tuple(y.shape) for y in fused(x)] == [(2, 32)] * 3
