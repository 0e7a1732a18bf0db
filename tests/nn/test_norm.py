import pytest
import torch

from lowmem.nn import layers
from tests.reference import model_oracles as oracles


@pytest.fixture(autouse=True)
def two_row_blocks(monkeypatch):
    """Blocks of two rows, so that five rows need three."""
    monkeypatch.setattr(layers, "BLOCK_ELEMENTS", 14)


def test_rms_norm_equals_its_definition():
    layer = layers.RMSNorm(7).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(7))
    x = torch.randn(5, 7, dtype=torch.float64)
    # sums of 7 squares: 10 roundings of 2^-53 on numbers below 10
    torch.testing.assert_close(layer(x), oracles.rms_norm(x, layer.weight, layer.eps), rtol=0, atol=1e-14)


def test_gradcheck():
    layer = layers.RMSNorm(7).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(7))
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.weight))


def test_bf16_is_computed_in_fp32_and_rounded_once():
    layer = layers.RMSNorm(7).bfloat16()
    x = torch.randn(5, 7).bfloat16()
    exact = oracles.rms_norm(x.double(), torch.ones(7), layer.eps)
    # half a unit in the last place of 8 bits: 2^-8, and 1e-6 for fp32 on the way
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8 + 1e-6, atol=0)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_autocast_returns_the_narrow_dtype_and_wide_gradients(kind):
    layer = layers.make_norm(kind, 8)
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32


def test_rms_norm_saves_its_input_and_one_number_per_row():
    layer = layers.RMSNorm(8)
    x = torch.randn(5, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(t.numel() for t in saved) == [5, 8, 40]


def test_layer_norm_equals_torch():
    layer = layers.LayerNorm(8)
    reference = torch.nn.LayerNorm(8)
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), reference(x))


@pytest.mark.parametrize("parts", ["both", "weight", "none"])
def test_layer_norm_in_bf16_has_the_gradients_of_its_definition(parts):
    x, grad = torch.randn(5, 7).bfloat16(), torch.randn(5, 7).bfloat16()
    weight, bias = (torch.rand(7) + 0.5).bfloat16(), torch.randn(7).bfloat16()
    chosen = [x] + {"both": [weight, bias], "weight": [weight], "none": []}[parts]

    def gradients(dtype, function):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in chosen]
        padded = [*leaves, None, None][:3]
        output = function(*padded)
        return output, torch.autograd.grad(output, leaves, grad.to(dtype))

    output, found = gradients(torch.bfloat16, lambda x, w, b: layers.layer_norm(x, w, b, 1e-5))
    expected, exact = gradients(torch.float64, lambda x, w, b: torch.nn.functional.layer_norm(x, (7,), w, b, 1e-5))
    for ours, theirs in zip([output, *found], [expected, *exact], strict=True):
        assert ours.dtype == torch.bfloat16
        # fp32 inside, terms up to 10, and one rounding to 8 bits
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-5)
