"""Rows of matrices: read, gathered and updated, they are those of the whole, to the bit."""

import pytest
import torch
from torch import nn

from lowmem.nn.loss import row_blocks
from lowmem.nn.quantized import dense, quantize
from lowmem.nn.rows import ResidentRows
from lowmem.optim.adamw import AdamW

VOCAB = 2 * 2048 + 37


def stored(kind: str, width: int = 128) -> nn.Parameter:
    values = torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(0))
    if kind in ("fp32", "bf16"):
        return nn.Parameter(values.to(torch.bfloat16 if kind == "bf16" else torch.float32))
    return nn.Parameter(quantize(values.bfloat16(), 8 if kind == "int8" else 4))


@pytest.mark.parametrize("width", [32, 96, 128, 200])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_rows_are_those_of_the_whole(kind, width):
    parameter = stored(kind, width)
    matrix, whole = ResidentRows(parameter), dense(parameter.detach(), parameter.dtype)
    assert (matrix.shape, matrix.dtype) == (whole.shape, whole.dtype)
    assert torch.equal(torch.cat([dense(matrix.read(rows), whole.dtype) for rows in row_blocks(VOCAB)]), whole)
    ids = torch.tensor([VOCAB - 1, 0, 7, 7, 2048, 3, VOCAB - 2, *range(1000, 2500)])
    assert torch.equal(matrix.gather(ids), whole[ids])
    assert torch.equal(torch.nn.functional.embedding(ids.view(-1, 1), parameter), whole[ids].unsqueeze(1))


@pytest.mark.parametrize("state_bits", [32, 8, 4])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_an_update_by_rows_is_that_of_the_whole(kind, state_bits):
    one, other = stored(kind), stored(kind)
    whole, rows = (AdamW([parameter], lr=0.01, state_bits=state_bits, seed=3) for parameter in (one, other))
    matrix = ResidentRows(other, rows.window)
    for step in range(3):
        grad = torch.randn(VOCAB, 128, generator=torch.Generator().manual_seed(step))
        whole.begin(one)
        whole.update(one, grad, grad_scale=0.5)
        rows.begin(other)
        for block in reversed(row_blocks(VOCAB)):  # in any order
            with matrix.updating(block) as window:
                rows.apply(other, window, grad[block].flatten(), start=block.start * 128, grad_scale=0.5)
    assert torch.equal(dense(one.detach(), torch.float32), dense(other.detach(), torch.float32))
    for name, value in whole.state[one].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(rows.state[other][name])), name


def test_a_window_of_another_size_is_refused():
    parameter = stored("fp32")
    optimizer = AdamW([parameter], state_bits=8)
    optimizer.begin(parameter)
    window = optimizer.window(parameter, 0, 256)
    with pytest.raises(ValueError, match="exp_avg has 256 numbers.*needs 384"):
        optimizer.apply(parameter, window, torch.zeros(384))
    optimizer = AdamW([parameter])
    optimizer.begin(parameter)
    window, more = optimizer.window(parameter, 0, 256), optimizer.window(parameter, 0, 384)
    with pytest.raises(ValueError, match="the window has 256 weights, the gradient 384"):
        optimizer.apply(parameter, type(window)(window.weights, None, more.states), torch.zeros(384))


def test_quantised_rows_begin_with_a_block():
    with pytest.raises(ValueError, match="row 1 begins at number 96, must begin at a multiple of 128"):
        ResidentRows(stored("int8", 96)).read(slice(1, 5))
