"""Boundary activations: what is written is read, in half the memory if asked for, and freed."""

import pytest
import torch

from lowmem.engine.layerwise import Boundaries, LossScale

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["same", "bf16"])
def test_rows_come_back_in_their_own_dtype(dtype):
    torch.manual_seed(0)
    boundaries, hidden = Boundaries(5, CPU, dtype=dtype), torch.randn(5, 3, 4)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        boundaries.write(7, rows, hidden[rows])
    expected = hidden if dtype == "same" else hidden.bfloat16().float()
    for rows in (slice(0, 5), slice(1, 3)):
        found = boundaries.read(7, rows)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected[rows])
    boundaries.prefetch(7, slice(0, 1))  # without offload there is nothing to fetch
    assert boundaries.nbytes() == 5 * 3 * 4 * (4 if dtype == "same" else 2)
    boundaries.free(7)
    assert boundaries.nbytes() == 0
    with pytest.raises(KeyError):
        boundaries.read(7, slice(0, 1))


def test_the_loss_scale_halves_doubles_and_stays_at_one_when_off():
    scale = LossScale(True, initial=8.0, growth_interval=2)
    scale.update_after(False)
    assert scale.get_scale() == 4.0
    for _ in range(2):
        scale.update_after(True)
    assert scale.get_scale() == 8.0
    for _ in range(5):
        scale.update_after(False)
    assert scale.get_scale() == 1.0
    assert not scale.may_shrink()
    other = LossScale(True)
    other.load_state_dict(scale.state_dict())
    assert other.get_scale() == 1.0
    off = LossScale(False)
    off.update_after(False)
    assert off.scale(torch.tensor(3.0)).item() == 3.0
    assert off.state_dict() == {}
