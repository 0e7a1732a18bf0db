"""Gradients of what has a gradient already: those of torch, without what torch imports for them."""

import subprocess
import sys

import pytest
import torch

from lowmem.nn.gradients import gradients_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_torch_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator).mul(30).to(dtype).requires_grad_() for _ in range(2))
    output = torch.nn.functional.gelu(x @ weight) * x
    grad = torch.randn(64, 64, generator=generator).to(dtype)
    expected = torch.autograd.grad(output, [x, weight], grad, retain_graph=True)
    for retain_graph in (True, False):
        found = gradients_of(output, [x, weight], grad, retain_graph=retain_graph)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients_of(output, [x, weight], grad)


def test_a_number_needs_no_gradient_and_what_is_not_reached_is_refused():
    x, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert torch.equal(gradients_of((x * 2).sum(), [x])[0], torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="not have been used"):
        gradients_of(x * 2, [other], torch.ones(3))
    with pytest.raises(RuntimeError, match="shape"):
        gradients_of(x * 2, [x], torch.ones(4))


def test_sympy_is_not_imported():
    code = """if True:
        import sys, torch
        from lowmem.nn.gradients import gradients_of
        x = torch.ones(3, requires_grad=True)
        gradients_of(x * 2, [x], torch.ones(3))
        assert "sympy" not in sys.modules and "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
