import pytest
import torch

from lowmem.nn.linear import Linear, linear, split_linear


def test_gradcheck_with_splits_and_bias():
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (7, 4), (7,)))
    assert torch.autograd.gradcheck(lambda *inputs: split_linear(*inputs, (5, 2)), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w), (x, weight))


def test_splits_are_contiguous_slices_of_the_whole():
    layer = Linear(4, 7, True, splits=(5, 2))
    x = torch.randn(2, 3, 4)
    first, second = layer(x)
    whole = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert first.is_contiguous()
    assert second.is_contiguous()
    # the same sums of 4 products, at most in another order: 4 * 2^-24 of values below 4
    torch.testing.assert_close(torch.cat([first, second], -1), whole, rtol=0, atol=1e-6)


def test_an_unused_split_has_a_zero_gradient():
    layer = Linear(4, 7, splits=(5, 2))
    layer(torch.randn(3, 4))[0].sum().backward()
    assert (layer.weight.grad[5:] == 0).all()
    assert (layer.weight.grad[:5] != 0).any()


def test_autocast_saves_the_stored_weight_not_a_narrow_copy():
    layer = Linear(4, 6)
    saved = []
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert any(t.data_ptr() == layer.weight.data_ptr() for t in saved)
    assert sum(t.nbytes for t in saved) == layer.weight.nbytes + 3 * 4 * 2  # and the input in bf16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    # one product of bf16 numbers summed over 3 tokens and rounded to bf16: 3 * 2^-9 of sums below 10
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(6, 4), rtol=0, atol=0.06)


def test_frozen_weight_saves_no_input():
    layer = Linear(4, 6).requires_grad_(False)
    saved = []
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert [t.shape for t in saved] == [layer.weight.shape]


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_initial_std(std):
    weight = Linear(200, 200, std=std).weight
    # 40,000 draws: the estimate's relative error is 1/sqrt(2 * 40000) = 0.35 %, five of them 1.8 %
    assert weight.std().item() == pytest.approx(std, rel=0.018)
