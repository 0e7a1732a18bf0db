"""The Triton optimizer kernel on a CUDA device: the definition's bits and the CPU kernels' bits, and the memory that a step takes.

Warnings are errors here, so a kernel that cannot start, whose place the definition would take, fails every test.
"""

import dataclasses

import pytest
import torch
from torch import nn

from lowmem.optim import AdamW, Lion
from lowmem.optim.kernels import reference
from lowmem.optim.kernels import triton as kernels
from lowmem.optim.kernels.formats import BLOCK, StepScalars
from lowmem.system.devices import cuda_problem
from tests.optim.kernels.cases import EVERY_FORM, gradient, new_states, random_weights
from tests.optim.kernels.triton_cases import DTYPES, any_codes, decaying_case, huge_case, make_scalars, subnormal_case, weights_at_the_edges

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]

CUDA = "cuda"


def trajectory(step_, device: str, name: str, bits: int, param: torch.Tensor, grads, scalars, states=None) -> list[torch.Tensor]:
    """Weight and states after the steps, as bytes."""
    tensors = [
        None if tensor is None else tensor.to(device, copy=True) for tensor in (param, *(states or new_states(name, bits, len(param))))
    ]
    for grad, numbers in zip(grads, scalars, strict=True):
        step_(tensors[0], grad.to(device), *tensors[1:], numbers, bits)
    return [tensor.cpu().view(torch.uint8) for tensor in tensors if tensor is not None]


def assert_equal_on_cuda(*case) -> None:
    """The kernel and the definition on CUDA against the definition on a CPU."""
    expected = trajectory(reference.step_, "cpu", *case)
    assert all(map(torch.equal, trajectory(kernels.step_, CUDA, *case), expected)), "the kernel"
    assert all(map(torch.equal, trajectory(reference.step_, CUDA, *case), expected)), "the definition on CUDA"


def scalars_of(name: str, steps: int) -> list[StepScalars]:
    return [dataclasses.replace(make_scalars(name, step), grad_scale=0.5, offset=BLOCK * step) for step in range(1, steps + 1)]


@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 5000, 100_001])
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_FORM
def test_every_dtype_and_length(name, bits, dtype, numel):
    for grad_dtype in DTYPES:
        grads = [gradient(numel, step, grad_dtype) for step in (1, 2, 3, 4)]
        assert_equal_on_cuda(name, bits, random_weights(numel, seed=1).to(dtype), grads, scalars_of(name, 4))


@pytest.mark.parametrize("case", [decaying_case, huge_case, subnormal_case])
@EVERY_FORM
def test_magnitudes_at_the_ends_of_fp32(name, bits, case):
    assert_equal_on_cuda(name, bits, *case(name))


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_FORM
def test_weights_at_the_edges_of_their_dtype(name, bits, dtype):
    param = weights_at_the_edges()
    grads = [torch.sign(random_weights(len(param), seed)) for seed in (8, 9)]
    assert_equal_on_cuda(name, bits, param.to(dtype), grads, [make_scalars(name, step, lr=lr) for step, lr in ((1, 0.0), (2, 1e-7))])


@EVERY_FORM
def test_any_codes_and_a_million_steps(name, bits):
    grads = [gradient(1100, step, torch.bfloat16) for step in (1, 2)]
    scalars = [make_scalars(name, step) for step in (1, 1_000_000)]
    assert_equal_on_cuda(name, bits, random_weights(1100, seed=7), grads, scalars, any_codes(name, bits, 1100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_a_number_stays_so(dtype):
    param = torch.full((BLOCK,), torch.nan, device=CUDA, dtype=dtype)
    states = [state.to(CUDA) for state in new_states("adamw", 8, BLOCK)]
    kernels.step_(param, torch.ones(BLOCK, device=CUDA), *states, make_scalars("adamw", 1), 8)
    assert param.isnan().all()


def test_more_numbers_than_32_bits_can_count():
    numel, start = (1 << 31) + 2000, (1 << 31) - 5 * BLOCK
    if torch.cuda.mem_get_info()[0] < 13 << 30:
        pytest.skip("needs 13 GiB")
    param = torch.ones(numel, dtype=torch.bfloat16, device=CUDA)
    grad = torch.zeros(numel, dtype=torch.bfloat16, device=CUDA)
    grad[start:] = gradient(numel - start, 1, torch.bfloat16).to(CUDA)
    states = [None if state is None else state.to(CUDA) for state in new_states("lion", 4, numel)]
    scalars = make_scalars("lion", 1)
    kernels.step_(param, grad, *states, scalars, 4)
    expected = [torch.ones(numel - start, dtype=torch.bfloat16, device=CUDA), *new_states("lion", 4, numel - start)]
    expected = [None if tensor is None else tensor.to(CUDA) for tensor in expected]
    reference.step_(expected[0], grad[start:], *expected[1:], dataclasses.replace(scalars, offset=start), 4)
    for one, other in zip((param, *states), expected, strict=True):
        assert one is None or torch.equal(one[-len(other) :], other)


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for weight in weights:
            weight.grad = gradient(weight.numel(), step, weight.dtype).view(weight.shape).to(weight.device)
        optimizer.step()


def bits_of(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> list[torch.Tensor]:
    states = [value for weight in weights for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in (*weights, *states)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, state_bits", [(kind, bits) for kind in (AdamW, Lion) for bits in kind.widths])
def test_states_move_between_devices_bit_for_bit(kind, state_bits, dtype):
    def make(device: str) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        matrix, vector = random_weights(300 * 128, 1).view(300, 128).to(dtype), random_weights(7, 2)
        weights = [nn.Parameter(matrix.to(device)), nn.Parameter(vector.to(device))]
        return kind(weights, lr=0.01, weight_decay=0.1, state_bits=state_bits), weights

    (here, weights_here), (there, weights_there) = make("cpu"), make(CUDA)
    train(here, weights_here, range(1, 6))
    train(there, weights_there, range(1, 3))
    moved, moved_weights = make("cpu")
    with torch.no_grad():
        for weight, source in zip(moved_weights, weights_there, strict=True):
            weight.copy_(source)
    moved.load_state_dict(there.state_dict())
    assert all(map(torch.equal, bits_of(moved, moved_weights), bits_of(there, weights_there)))
    train(moved, moved_weights, range(3, 5))
    there.load_state_dict(moved.state_dict())
    with torch.no_grad():
        for weight, source in zip(weights_there, moved_weights, strict=True):
            weight.copy_(source)
    train(there, weights_there, range(5, 6))
    assert all(map(torch.equal, bits_of(there, weights_there), bits_of(here, weights_here)))


@pytest.mark.parametrize("kind, state_bits", [(kind, bits) for kind in (AdamW, Lion) for bits in kind.widths])
def test_a_step_allocates_nothing(kind, state_bits):
    weight = nn.Parameter(torch.ones(4096, 4096, dtype=torch.bfloat16, device=CUDA))  # 32 MiB
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], state_bits=state_bits)
    optimizer.step()  # allocates the states and loads the kernel
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 1_000_000
