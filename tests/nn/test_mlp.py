import torch

from lowmem.config.schema import LorptConfig
from lowmem.nn.layers import GELUMLP, SwiGLU, default_hidden_dim, swiglu
from lowmem.nn.lorpt import LinearFactory
from tests.reference import model_oracles as oracles


def test_swiglu_equals_its_definition():
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, up), oracles.swiglu(gate, up), rtol=0, atol=1e-14)  # 10 roundings of numbers below 10


def test_gradcheck():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_incoming_gradients_are_left_alone():
    gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    grad = torch.randn(3, 4)
    kept = grad.clone()
    swiglu(gate, up).backward(grad)
    assert torch.equal(grad, kept)


def test_swiglu_saves_two_hidden_vectors_per_token_besides_the_linear_inputs():
    layer = SwiGLU(8, 24, LinearFactory(LorptConfig()), "mlp")
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer(torch.randn(5, 8, requires_grad=True))
    weights = {p.data_ptr() for p in layer.parameters()}
    assert sum(t.numel() for key, t in saved.items() if key not in weights) == 5 * (8 + 3 * 24)


def test_gelu_layer():
    layer = GELUMLP(8, 32, LinearFactory(LorptConfig()), "mlp", bias=True)
    x = torch.randn(5, 8)
    hidden = torch.nn.functional.gelu(x @ layer.up.weight.t() + layer.up.bias)
    # sums of 32 products of size 0.1: 32 * 2^-24
    torch.testing.assert_close(layer(x), hidden @ layer.down.weight.t() + layer.down.bias, rtol=0, atol=2e-6)


def test_default_hidden_dim():
    assert default_hidden_dim("swiglu", 1024) == 2752  # 2730.7 rounded up to a multiple of 64
    assert default_hidden_dim("swiglu", 24) == 64  # 64 exactly
    assert default_hidden_dim("gelu", 512) == 2048
