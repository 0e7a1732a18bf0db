"""What the low-bit optimizers refuse instead of corrupting memory, and that a copy is a whole optimizer."""

import copy

import pytest
import torch

from lowmem.optim import AdamW


def test_states_of_another_width_are_refused_before_a_kernel_sees_them():
    parameter = torch.nn.Parameter(torch.randn(40, 128))
    parameter.grad = torch.randn(40, 128)
    optimizer = AdamW([parameter], state_bits=4)
    optimizer.step()
    for bits in (8, 32):
        optimizer.param_groups[0]["state_bits"] = bits
        with pytest.raises(ValueError, match=f"exp_avg has 2560 numbers of torch.uint8, state_bits={bits} needs 5120"):
            optimizer.step()


def test_a_part_must_end_with_a_block():
    parameter = torch.nn.Parameter(torch.randn(50, 100))
    optimizer = AdamW([parameter])
    optimizer.begin(parameter)
    optimizer.update(parameter, torch.randn(5000 - 4992), start=4992)
    with pytest.raises(ValueError, match="ends at 1100, must end at a multiple of 128"):
        optimizer.update(parameter, torch.randn(76), start=1024)


def test_a_copy_goes_on_as_the_original():
    parameter = torch.nn.Parameter(torch.randn(40, 128).bfloat16())
    optimizer = AdamW([parameter], state_bits=4, seed=3)
    parameter.grad = torch.randn(40, 128).bfloat16()
    optimizer.step()
    other = copy.deepcopy(optimizer)
    twin = other.param_groups[0]["params"][0]
    twin.grad = parameter.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(parameter, twin)
