"""Cross-entropy with the weight gradient in rows: the loss and the gradients of the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from lowmem.nn.loss import GRAD_BLOCK_ROWS, IGNORE_INDEX, CrossEntropyByRows, CrossEntropyOptions
from lowmem.nn.rows import ResidentRows

TOKENS, DIM, VOCAB = GRAD_BLOCK_ROWS + 5, 6, 2 * GRAD_BLOCK_ROWS + 37  # two chunks of tokens, three of rows, none of them even


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [CrossEntropyOptions(), CrossEntropyOptions(100, 0.1, 1e-2)])
def test_loss_and_gradients_are_those_of_the_formula(bias, options):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(VOCAB, (TOKENS,))
    targets[::7] = IGNORE_INDEX
    logits = F.linear(hidden, weight, offset)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=options.label_smoothing)
    expected = expected + options.z_loss * (logits.logsumexp(1) ** 2)[targets != IGNORE_INDEX].sum()
    expected.backward()
    work = CrossEntropyByRows(hidden, ResidentRows(weight), None if offset is None else offset.detach(), targets, options, torch.float64)
    torch.testing.assert_close(work.loss, expected.detach(), rtol=1e-12, atol=0)
    parts = [(first, rows.clone(), part) for first, rows, part in work.gradients()]  # the next rows overwrite these
    assert [first for first, _, _ in parts] == [0, GRAD_BLOCK_ROWS, 2 * GRAD_BLOCK_ROWS]
    # fp64: sums of 2,000 to 4,000 terms of size 1 in another order
    torch.testing.assert_close(torch.cat([rows for _, rows, _ in parts]), weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(work.grad_hidden, hidden.grad, rtol=1e-10, atol=1e-12)
    if offset is not None:
        torch.testing.assert_close(torch.cat([part for _, _, part in parts]), offset.grad, rtol=1e-10, atol=1e-12)


def test_rows_may_change_once_their_gradient_is_out():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, DIM), torch.randn(VOCAB, DIM), torch.randint(VOCAB, (9,))
    still = CrossEntropyByRows(hidden, ResidentRows(weight.clone()), None, targets, CrossEntropyOptions(), torch.float32)
    moving = CrossEntropyByRows(hidden, ResidentRows(weight), None, targets, CrossEntropyOptions(), torch.float32)
    for (first, one, _), (_, other, _) in zip(still.gradients(), moving.gradients(), strict=True):
        assert torch.equal(one, other)
        weight[first : first + GRAD_BLOCK_ROWS] = 1e6
    assert torch.equal(still.grad_hidden, moving.grad_hidden)


def skewed(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and targets in fp64 whose logits have an outlier, change their sign, or are very low for a whole block."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 24, dtype=torch.float64, generator=generator)
    weight = torch.randn(VOCAB, 24, dtype=torch.float64, generator=generator)
    hidden[:, 0] = 1
    if kind == "outlier":
        weight[VOCAB - 3] *= 20
    elif kind == "rising":  # each block has a new maximum
        weight[:, 0] += torch.arange(VOCAB, dtype=torch.float64) / 100
    elif kind == "signs":
        hidden[::2] *= -30
    elif kind == "low first block":
        weight[:GRAD_BLOCK_ROWS, 0] = -1e6
    targets = (VOCAB ** torch.rand(700, generator=generator)).long() - 1  # log-uniform: few tokens are most of them
    targets[::9] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("kind", ["plain", "outlier", "rising", "signs", "low first block"])
@pytest.mark.parametrize(
    "options", [CrossEntropyOptions(), CrossEntropyOptions(0, 0.1, 1e-3, softcap=30.0), CrossEntropyOptions(0, 0.1, 1e-3)]
)
def test_the_running_sum_is_the_direct_one(kind, options):
    hidden, weight, targets = (part.float() if part.is_floating_point() else part for part in skewed(kind))
    logits = hidden.double() @ weight.double().t()
    largest = logits.abs().amax(1, keepdim=True)
    logits = options.reshape_(logits)
    lse, live = logits.logsumexp(1), targets != IGNORE_INDEX
    losses = torch.lerp(lse - logits.gather(1, targets.clamp_min(0).unsqueeze(1))[:, 0], lse - logits.mean(1), options.label_smoothing)
    exact = (losses + options.z_loss * lse.square())[live].sum()
    found = CrossEntropyByRows(hidden, ResidentRows(weight), None, targets, options, torch.float32)
    # A logit is a sum of 24 products and off by at most 24 * 2^-24 of its size; the loss is off by no more than its two largest logits,
    # z-loss by 2 c lse times that; sums of V exponentials and of 700 losses add some hundred roundings of their own size.
    slope = 2 + 2 * options.z_loss * lse.abs()
    bound = (24 * 2**-24 * largest[:, 0] * slope)[live].sum() + 300 * 2**-24 * (losses.abs() + options.z_loss * lse.square())[live].sum()
    assert (found.loss.double() - exact).abs() <= bound
    in_wide = CrossEntropyByRows(hidden.double(), ResidentRows(weight.double()), None, targets, options, torch.float64)
    assert in_wide.loss.item() == pytest.approx(exact.item(), rel=1e-12)


def test_cells_without_memory_are_done_again_with_half_the_tokens_in_both_passes():
    hidden, weight, targets = (part.float() if part.is_floating_point() else part for part in skewed("plain"))
    fitting, tried = [128], []

    def attempt(cell) -> bool:
        tokens = cell.args[-1]
        tried.append(tokens.stop - tokens.start)
        if tried[-1] > fitting[0]:
            return False
        cell()
        return True

    whole = CrossEntropyByRows(hidden, ResidentRows(weight), None, targets, CrossEntropyOptions(), torch.float32)
    parts = CrossEntropyByRows(hidden, ResidentRows(weight), None, targets, CrossEntropyOptions(), torch.float32, attempt=attempt)
    assert tried[:5] == [1024, 350, 175, 87, 87]
    assert (parts.ran_out, whole.ran_out) == (True, False)
    fitting[0] = 50
    for (_, one, _), (_, other, _) in zip(whole.gradients(), parts.gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert parts.block_tokens == 43
    torch.testing.assert_close(whole.loss, parts.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.grad_hidden, parts.grad_hidden, rtol=1e-4, atol=1e-6)


def test_each_row_is_read_once_a_pass():
    hidden, weight, targets = skewed("plain")
    matrix, read = ResidentRows(weight), []
    matrix.read = lambda rows: read.append(rows) or weight[rows]
    work = CrossEntropyByRows(hidden, matrix, None, targets, CrossEntropyOptions(), torch.float64, block_tokens=100)
    assert [rows.start for rows in read] == [0, GRAD_BLOCK_ROWS, 2 * GRAD_BLOCK_ROWS]
    assert sum(1 for _ in work.gradients()) == 3
    assert len(read) == 6
