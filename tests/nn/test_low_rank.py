import pytest
import torch
import torch.nn.functional as F

from lowmem.config.schema import LorptConfig
from lowmem.nn.linear import Linear
from lowmem.nn.lorpt import Factors, LinearFactory, LoRPtLinear, LoRPtSplit, auto_rank, break_even_rank, low_rank, product_wins


def factors(out, rank, splits=None, silu=False, bias=True, in_features=6):
    tensors = [torch.randn(rank, in_features), torch.randn(out, rank), torch.randn(out)]
    down, up, offset = (tensor.double().requires_grad_() for tensor in tensors)
    return Factors(down, up, offset if bias else None, splits or (out,), silu)


CASES = {
    "one": [{"out": 8, "rank": 2}],
    "no bias, silu": [{"out": 8, "rank": 2, "bias": False, "silu": True}],
    "three of one input": [{"out": 4, "rank": 2}, {"out": 5, "rank": 3, "silu": True}, {"out": 4, "rank": 1, "bias": False}],
    "one latent, two outputs": [{"out": 8, "rank": 2, "splits": (5, 3), "silu": True}],
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    torch.manual_seed(0)
    layers = [factors(**choices) for choices in CASES[case]]
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [tensor for layer in layers for tensor in layer[:3] if tensor is not None]
    assert torch.autograd.gradcheck(lambda *_: low_rank(x, layers), (x, *weights))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_plain_products(case):
    torch.manual_seed(0)
    layers = [factors(**choices) for choices in CASES[case]]
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    outputs = iter(low_rank(x, layers))
    for layer in layers:
        hidden = x @ layer.down.t()
        expected = F.linear(F.silu(hidden) if layer.silu else hidden, layer.up, layer.bias)
        for part in expected.split(layer.splits, -1):
            output = next(outputs)
            assert output.is_contiguous()
            # 6 + 3 products of numbers below 30, in fp64
            torch.testing.assert_close(output, part, rtol=0, atol=9 * 30 * 2**-52)
    assert next(outputs, None) is None


def test_autocast_keeps_no_narrow_copy_of_the_weights():
    layer = LoRPtLinear(64, 64, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(8, 64, requires_grad=True))
    assert y.dtype == torch.bfloat16
    # input and latent in bf16, both factors and the bias as they are stored
    assert sorted((t.dtype == torch.bfloat16, t.numel()) for t in saved) == sorted(
        [(True, 8 * 64), (True, 8 * 16), (False, 16 * 64), (False, 64 * 16), (False, 64)]
    )
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_a_frozen_factor_gets_no_gradient():
    layer = LoRPtLinear(16, 16, 4)
    layer.down.requires_grad_(False)
    layer(torch.randn(3, 16)).sum().backward()
    assert layer.down.grad is None
    assert layer.up.grad.shape == (16, 4)


def test_the_product_never_wins_where_a_rank_saves_weights():
    for in_features, out_features in ((64, 64), (512, 2048), (2048, 512)):
        limit = break_even_rank(in_features, out_features)
        for rank in (1, int(limit / 2), int(limit - 1e-9)):
            assert not any(product_wins(n, in_features, out_features, rank, cached=c) for n in (1, 100, 10**6) for c in (False, True))
    # 48 of 64x64 costs 1.5 times the dense product a token; building it costs 48 * 4096, won back after 48 * 4096 / (2048) = 96 tokens
    assert not product_wins(96, 64, 64, 48)
    assert product_wins(97, 64, 64, 48)
    assert product_wins(1, 64, 64, 48, cached=True)


@pytest.mark.parametrize("splits", [(), (40, 24)])
def test_above_the_break_even_the_product_is_built_and_cached(splits, monkeypatch):
    torch.manual_seed(0)
    layer = LoRPtLinear(64, 64, 48, splits=splits, strict=False).double()
    x = torch.randn(200, 64, dtype=torch.float64)
    monkeypatch.setattr("lowmem.nn.lorpt.low_rank", lambda *_: pytest.fail("the factors were used"))
    expected = x @ (layer.up @ layer.down).t() + layer.bias
    with torch.no_grad():
        y = layer(x)
        first = layer._product[1]
        layer(x)
        assert layer._product[1] is first
        layer.up.mul_(2)
        again = layer(x)
    # 112 products of numbers below 10
    join = torch.cat if splits else lambda parts, _: parts
    torch.testing.assert_close(join(y, -1), expected, rtol=0, atol=112 * 10 * 2**-52)
    torch.testing.assert_close(join(again, -1), 2 * expected, rtol=0, atol=112 * 20 * 2**-52)
    trained = layer(x)
    (trained[0] if splits else trained).sum().backward()
    assert layer.down.grad is not None


def test_auto_rank_takes_at_most_half_of_the_weights():
    assert (auto_rank(512, 512), auto_rank(256, 704), auto_rank(4, 4), auto_rank(1, 1)) == (128, 88, 1, 1)
    for shape in ((512, 512), (256, 704), (100, 4096)):
        rank = auto_rank(*shape)
        assert rank * sum(shape) <= shape[0] * shape[1] / 2 < (rank + 8) * sum(shape)
    assert LoRPtLinear(256, 704, "auto").rank == 88


def test_spectral_init_keeps_the_largest_singular_values_of_a_dense_layer():
    torch.manual_seed(0)
    layer = LoRPtLinear(96, 64, 16, init="spectral", dense_std=0.05)
    torch.manual_seed(0)
    dense = torch.empty(64, 96).normal_(std=0.05)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    best = left[:, :16] * values[:16] @ right[:16]
    # fp32 SVD and products of numbers below 1: 200 roundings of 2^-24
    torch.testing.assert_close(layer.merged_weight(), best, rtol=0, atol=200 * 2**-24)
    torch.testing.assert_close(layer.up.norm(dim=0), layer.down.norm(dim=1), rtol=1e-4, atol=0)  # balanced


def test_a_group_of_low_rank_layers_is_computed_together_and_equals_its_layers():
    torch.manual_seed(0)
    outputs = {"q": 32, "k": 32, "v": 16}
    lorpt = LorptConfig(rank=4, targets=["attention"], bottleneck="silu")
    group = LinearFactory(lorpt).split(32, outputs, True, group="attention", name="qkv").double()
    assert type(group) is LoRPtSplit
    assert [name for name, _ in group.named_children()] == ["q", "k", "v"]
    x = torch.randn(7, 32, dtype=torch.float64)
    for together, layer in zip(group(x), group.children(), strict=True):
        # 36 products of numbers below 10
        torch.testing.assert_close(together, layer(x), rtol=0, atol=36 * 10 * 2**-52)


def test_share_down_makes_one_layer_of_a_group():
    lorpt = LorptConfig(rank=8, targets=["mlp"], share_down=True)
    factory = LinearFactory(lorpt)
    shared = factory.split(32, {"gate": 48, "up": 48}, False, group="mlp", name="gate_up")
    assert type(shared) is LoRPtLinear
    assert sum(p.numel() for p in shared.parameters()) == 8 * (32 + 96)
    assert [tuple(y.shape) for y in shared(torch.randn(2, 32))] == [(2, 48), (2, 48)]
    assert type(factory.split(32, {"q": 32, "k": 32}, False, group="attention", name="qkv")) is Linear
