"""Cross-entropy with the weight gradient in rows: the loss and the gradients of the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from lowmem.nn.loss import GRAD_BLOCK_ROWS, IGNORE_INDEX, CrossEntropyByRows, CrossEntropyOptions

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
    work = CrossEntropyByRows(hidden, weight, None if offset is None else offset.detach(), targets, options, torch.float64)
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
    still = CrossEntropyByRows(hidden, weight.clone(), None, targets, CrossEntropyOptions(), torch.float32)
    moving = CrossEntropyByRows(hidden, weight, None, targets, CrossEntropyOptions(), torch.float32)
    for (first, one, _), (_, other, _) in zip(still.gradients(), moving.gradients(), strict=True):
        assert torch.equal(one, other)
        weight[first : first + GRAD_BLOCK_ROWS] = 1e6
    assert torch.equal(still.grad_hidden, moving.grad_hidden)
