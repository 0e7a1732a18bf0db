import itertools
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import LorptConfig
from lowmem.nn import layers
from lowmem.nn.lorpt import LinearFactory
from lowmem.nn.loss import CrossEntropyOptions, auto_chunk_tokens, chunked_cross_entropy
from tests.reference import model_oracles as oracles

N, C, V = 23, 8, 37


def problem(dtype, bias, ignored):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype)
    offset = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(0, V, (N,), generator=generator)
    if ignored == "some":
        targets[::3] = -100
    elif ignored == "all":
        targets[:] = -100
    inputs = [x.requires_grad_() for x in (hidden, weight, offset) if x is not None]
    return inputs, offset, targets


def relative_errors(dtype, bias, ignored, chunk, smoothing, z_loss):
    inputs, offset, targets = problem(dtype, bias, ignored)
    options = CrossEntropyOptions(chunk, smoothing, z_loss)
    loss = chunked_cross_entropy(inputs[0], inputs[1], offset, targets, 7.0, options)
    grads = torch.autograd.grad(loss, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = oracles.cross_entropy(exact[0], exact[1], exact[2] if bias else None, targets, 7.0, smoothing, z_loss)
    expected_grads = torch.autograd.grad(expected, exact)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    pairs = [(loss, expected), *zip(grads, expected_grads, strict=True)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


VARIANTS = list(itertools.product((False, True), ("none", "some"), (0, 1, 5, 23), (0.0, 0.1), (0.0, 1e-2)))


@pytest.mark.parametrize("bias,ignored,chunk,smoothing,z_loss", VARIANTS)
def test_equals_plain_cross_entropy_in_fp64(bias, ignored, chunk, smoothing, z_loss):
    # sums of at most V * N = 851 terms: 851 * 2^-53 = 1e-13
    assert max(relative_errors(torch.float64, bias, ignored, chunk, smoothing, z_loss)) < 1e-13


@pytest.mark.parametrize("chunk", [0, 5])
def test_equals_plain_cross_entropy_in_fp32(chunk):
    # rounding errors of independent sums grow like the root of their length: sqrt(851) * 2^-24 = 1.7e-6, doubled for the softmax
    assert max(relative_errors(torch.float32, True, "some", chunk, 0.1, 1e-2)) < 3.5e-6


@pytest.mark.parametrize("chunk", [0, 5])
def test_equals_plain_cross_entropy_in_bf16(chunk):
    # rounding to 8 bits is off by 2^-9 on average. A gradient passes three: the logit (up to 8, an absolute error of the
    # exponent of 8 * 2^-9 = 1.6 %), its gradient and the result (0.2 % each): below 2.5 % of the norm
    loss, *grads = relative_errors(torch.bfloat16, True, "some", chunk, 0.0, 0.0)
    assert loss < 0.01
    assert max(grads) < 0.025


def test_bf16_weight_gradient_does_not_decay_with_the_number_of_chunks():
    # 512 equal contributions: a bf16 sum stops growing at 256 times one of them, an fp32 sum does not
    hidden = torch.full((512, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, None, torch.zeros(512, dtype=torch.int64), 1.0, CrossEntropyOptions(chunk_tokens=1))
    (grad,) = torch.autograd.grad(loss, [weight])
    assert grad.flatten().tolist() == [-256.0, 256.0]  # 512 tokens * probability 1/2, exact in bf16


def test_all_ignored_gives_zero_loss_and_zero_gradients():
    inputs, offset, targets = problem(torch.float32, True, "all")
    loss = chunked_cross_entropy(inputs[0], inputs[1], offset, targets, 7.0)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, inputs))


def test_large_logits_stay_finite():
    # the target's probability underflows to 0, its loss must still be the difference of logits, 2000
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, None, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2000
    assert hidden.grad.item() == 2  # w_0 - w_1


def test_fp16_gradients_survive_a_large_denominator():
    # p / denominator is 1e-5 / 65536 = 2e-10, below fp16's smallest number 6e-8; scaled back by the loss scale it must be there
    hidden = torch.randn(4, C).half().requires_grad_()
    weight = torch.randn(V, C).half().requires_grad_()
    targets = torch.zeros(4, dtype=torch.int64)
    (scaled,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, None, targets, 65536.0), [hidden], torch.tensor(65536.0))
    (plain,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, None, targets, 1.0), [hidden])
    assert torch.equal(scaled, plain)


def test_no_tensor_is_larger_than_one_chunk_of_logits():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    hidden = torch.randn(256, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, None, torch.zeros(256, dtype=torch.int64), 1.0, CrossEntropyOptions(32)).backward()
    assert largest.elements == 32 * 1000


def test_no_gradient_is_formed_when_none_is_wanted():
    inputs, offset, targets = problem(torch.float32, True, "some")
    expected = chunked_cross_entropy(inputs[0], inputs[1], offset, targets, 7.0)
    with torch.no_grad():
        loss = chunked_cross_entropy(inputs[0], inputs[1], offset, targets, 7.0)
    assert loss.grad_fn is None
    assert torch.equal(loss, expected)


def test_frozen_weight_and_second_backward():
    inputs, _, targets = problem(torch.float32, False, "some")
    inputs[1].requires_grad_(False)
    loss = chunked_cross_entropy(inputs[0], inputs[1], None, targets)
    loss.backward(retain_graph=True)
    assert inputs[1].grad is None
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_gradients_are_the_slopes_of_the_loss():
    # torch.autograd.gradcheck would differentiate one loss several times, which this one refuses
    inputs, offset, targets = problem(torch.float64, True, "some")
    options = CrossEntropyOptions(5, 0.1, 1e-2)
    grads = torch.autograd.grad(chunked_cross_entropy(inputs[0], inputs[1], offset, targets, 7.0, options), inputs)
    torch.manual_seed(1)
    step = 1e-5
    for index, grad in enumerate(grads):
        direction = torch.randn_like(grad)
        ends = []
        for sign in (1, -1):
            moved = [x.detach() + sign * step * direction if i == index else x.detach() for i, x in enumerate(inputs)]
            ends.append(chunked_cross_entropy(*moved, targets, 7.0, options).item())
        slope = (ends[0] - ends[1]) / (2 * step)
        # central differences: step^2 = 1e-10 times the third derivative, and 1e-15 / step = 1e-10 of rounding, loss of order 10
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-7)


def test_auto_chunk_is_about_16_mib_of_logits():
    tokens = auto_chunk_tokens(32000, 512, 2)
    assert tokens % 64 == 0
    assert 15 << 20 <= tokens * 32000 * 2 <= 16 << 20
    assert auto_chunk_tokens(32000, 2048, 2) == 1024  # half of the width
    assert auto_chunk_tokens(1 << 30, 1, 4) == 1


@pytest.mark.parametrize("kind", ["dense", "bias", "lorpt", "silu", "tied"])
def test_every_head_computes_the_loss_of_its_logits(kind):
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (3, 7))
    targets[0, :3] = -100
    weights = ()
    if kind == "tied":
        module, weights = layers.TiedHead(), (torch.randn(V, 16, dtype=torch.float64, requires_grad=True),)
    else:
        rank = 5 if kind in ("lorpt", "silu") else 0
        lorpt = LorptConfig(rank=rank, targets=["head"], bottleneck="silu" if kind == "silu" else "linear")
        module = layers.make_head(16, V, kind != "dense", LinearFactory(lorpt)).double()
    wanted = [hidden, *weights, *module.parameters()]
    loss = module(hidden, *weights, targets, 5.0, CrossEntropyOptions(chunk_tokens=4))
    logits = module(hidden, *weights).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / 5.0
    # at most 21 * 37 terms: 777 * 2^-53 = 9e-14
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for grad, exact in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_like_narrow_weights_and_returns_wide_gradients(dtype):
    inputs, _, targets = problem(torch.float32, False, "some")
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
    expected = chunked_cross_entropy(*narrow, None, targets, 7.0, CrossEntropyOptions(5))
    with torch.autocast("cpu", dtype):
        loss = chunked_cross_entropy(*inputs, None, targets, 7.0, CrossEntropyOptions(5))
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss, inputs)
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    # narrow gradients are rounded twice, before and after the division by 7: two half units in the last place
    torch.testing.assert_close(grads[1], torch.autograd.grad(expected, narrow)[1].float(), rtol=torch.finfo(dtype).eps, atol=0)


def test_runs_without_data():
    with FakeTensorMode():
        hidden = torch.empty(2, 9, C, requires_grad=True)
        weight = torch.empty(V, C, requires_grad=True)
        loss = chunked_cross_entropy(hidden, weight, None, torch.zeros(2, 9, dtype=torch.int64), torch.tensor(3.0))
        loss.backward()
        assert hidden.grad.shape == hidden.shape
        assert re.search("FakeTensor", str(loss))
