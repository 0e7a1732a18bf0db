"""Every gradient that is a sum over tokens, in bf16 against fp64: many tokens, one of them large, and terms that do not cancel."""

import pytest
import torch

from lowmem.nn.layers import RMSNorm
from lowmem.nn.linear import split_linear
from lowmem.nn.lorpt import Factors, low_rank
from lowmem.nn.loss import CrossEntropyByRows, CrossEntropyOptions, SoftTargets, chunked_cross_entropy
from lowmem.nn.quantized import quantize
from lowmem.nn.recurrent import hybrid_scan
from lowmem.nn.rows import ResidentRows

TOKENS, WIDTH, VOCAB = 8192, 32, 40
BF16 = torch.bfloat16
UNIT = 2**-9  # what a rounding to 8 bits is off by, in the mean: half a unit of 2^-8 at most


def numbers(*shape: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (mean + std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(BF16)


def tokens() -> torch.Tensor:
    x = numbers(TOKENS, WIDTH, mean=0.3)
    x[5] *= 50
    return x


def rms(x, weight):
    layer = RMSNorm(WIDTH).to(weight.dtype)
    del layer.weight
    layer.weight = weight
    return layer(x)


LATENT = [numbers(8, WIDTH, std=0.1), numbers(24, 8), numbers(24)]
CELL = [numbers(WIDTH, mean=0.9, std=0.01), numbers(8, 8, std=0.1), numbers(8, WIDTH, std=0.1), numbers(WIDTH, 8, std=0.1), numbers(WIDTH)]
# the function, its weights, and the roundings on the way to their gradients: of a latent and of its gradient, of an output of the scan
CASES = {
    "linear": (lambda x, w, b: split_linear(x, w, b, (8, 16)), [numbers(24, WIDTH, std=0.1), numbers(24)], 1),
    "low_rank": (lambda x, d, u, b: low_rank(x, [Factors(d, u, b, (24,), False)]), LATENT, 2),
    "silu": (lambda x, d, u, b: low_rank(x, [Factors(d, u, b, (24,), True)]), LATENT, 3),
    "rms_norm": (rms, [numbers(WIDTH, mean=1.0, std=0.2)], 1),
    "hybrid": (lambda x, *w: hybrid_scan(x.view(16, -1, WIDTH), *w).flatten(0, 1), CELL, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_over_tokens_are_off_by_roundings_of_their_terms_and_one_of_the_result(case):
    function, weights, roundings = CASES[case]
    results = []
    for dtype in (BF16, torch.float64):
        leaves = [part.to(dtype, copy=True).requires_grad_() for part in (tokens(), *weights)]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [numbers(*output.shape, mean=0.05, std=0.1, seed=1).to(dtype) for output in outputs]
        results.append(torch.autograd.grad(outputs, leaves[1:], grads))
    for found, exact in zip(*results, strict=True):
        assert ((found.double() - exact).norm() / exact.norm()).item() < roundings * UNIT


def head(scale: float = 0.2) -> list[torch.Tensor]:
    return [numbers(TOKENS, WIDTH), numbers(VOCAB, WIDTH, std=scale, seed=1), numbers(VOCAB, seed=2)]


def in_rows(parts: list[torch.Tensor]) -> tuple[torch.Tensor, ResidentRows, torch.Tensor]:
    return parts[0], ResidentRows(parts[1]), parts[2]


def skewed_targets() -> torch.Tensor:
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
    targets[::2] = 7
    return targets


def losses(parts: list[torch.Tensor], targets: torch.Tensor, options: CrossEntropyOptions) -> list[torch.Tensor]:
    """The loss and its gradients, a token in the mean."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    loss = chunked_cross_entropy(*leaves, targets, float(TOKENS), options)
    return [loss, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", [CrossEntropyOptions(64), CrossEntropyOptions(64, 0.1, 1e-3)])
def test_a_frequent_target_does_not_swallow_the_gradients_of_the_head(options):
    found = losses(head(), skewed_targets(), options)
    exact = losses([part.double() for part in head()], skewed_targets(), options)
    # a logit of size 1 is off by 2^-9, and its probability with it, its gradient by another rounding, as is the result
    assert all(((ours.double() - theirs).norm() / theirs.norm()).item() < 3 * UNIT for ours, theirs in zip(found, exact, strict=True))
    rows = CrossEntropyByRows(*in_rows(head()), skewed_targets(), options, BF16)
    of_weight = torch.cat([block.clone() for _, block, _ in rows.gradients()]) / TOKENS
    assert ((of_weight.double() - exact[2]).norm() / exact[2].norm()).item() < 3 * UNIT


def soft(parts: list[torch.Tensor], scale: float = 1.0) -> SoftTargets:
    hidden, weight, bias = (scale * numbers(*part.shape, seed=9 + index).to(part.dtype) for index, part in enumerate(parts))
    return SoftTargets(hidden, weight, bias, 0.5, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("taught", [False, True])
def test_logits_of_ten_thousand_are_finite(dtype, taught):
    parts = [part.to(dtype) for part in head()]
    parts[0], parts[1] = 60 * parts[0], 100 * parts[1]
    assert (parts[0].float() @ parts[1].float().t()).abs().max() > 1e4
    options = CrossEntropyOptions(64, 0.1, 1e-4, soft(parts, 30.0) if taught else None)
    assert all(tensor.isfinite().all() for tensor in losses(parts, skewed_targets(), options))
    if not taught:
        rows = CrossEntropyByRows(*in_rows(parts), skewed_targets(), options, dtype)
        assert all(block.isfinite().all() for _, block, _ in rows.gradients())
        assert rows.loss.isfinite()
        assert rows.grad_hidden.isfinite().all()


@pytest.mark.parametrize("taught", [False, True])
def test_without_a_target_there_is_no_loss_and_no_gradient(taught):
    parts, nothing = head(), torch.full((TOKENS,), -100)
    options = CrossEntropyOptions(64, 0.1, 1e-4, soft(parts) if taught else None)
    assert not any(tensor.any() for tensor in losses(parts, nothing, options))
    rows = CrossEntropyByRows(*in_rows(parts), nothing, CrossEntropyOptions(64, 0.1, 1e-4), BF16)
    assert not any(block.any() for _, block, _ in rows.gradients())
    assert not rows.loss
    assert not rows.grad_hidden.any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_layer_sums_its_gradient_as_a_plain_one(bits):
    weight, bias = torch.nn.Parameter(quantize(numbers(24, WIDTH), bits)), numbers(24).requires_grad_()
    (output,) = split_linear(tokens(), weight, bias, (24,))
    grad = numbers(TOKENS, 24, mean=0.05, std=0.1, seed=1)
    output.backward(grad)
    exact = grad.double().t() @ tokens().double()
    assert ((weight.grad.double() - exact).norm() / exact.norm()).item() < UNIT
