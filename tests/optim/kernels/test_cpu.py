"""The C++ kernels equal the definition to the last bit, whatever the instruction set and the number of threads; what they cost."""

import itertools
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from lowmem.memory.procfs import status_bytes
from lowmem.nn.quantized import quantize
from lowmem.optim.kernels import cpu, reference
from lowmem.optim.kernels.formats import BLOCK, FORMATS
from tests.optim.kernels.cases import BAD, EVERY_FORM, gradient, new_states, random_weights, scalars_of

compiled = pytest.mark.skipif(cpu.library() is None, reason="the kernels are not compiled")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def isas() -> list[int]:
    """Those of this machine."""
    kernels = cpu.library()
    return [] if kernels is None else list(range(kernels.lowmem_best_isa() + 1))


def trajectory(step_, name: str, bits: int, param: torch.Tensor, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Weight and states after the steps, as bytes."""
    param = param.clone()
    states = new_states(name, bits, param.numel())
    for step, grad in enumerate(grads, start=1):
        step_(param, grad, *states, scalars_of(name, step), bits)
    return [tensor.view(torch.uint8) for tensor in (param, *states) if tensor is not None]


@compiled
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 4095, 9000, 40037])
@EVERY_FORM
def test_every_instruction_set_equals_the_definition(name, bits, numel, monkeypatch):
    for param_dtype in DTYPES:
        for grad_dtype in DTYPES:
            param = random_weights(numel, seed=1).to(param_dtype)
            grads = [gradient(numel, step, grad_dtype) for step in (1, 2, 3, 4)]
            expected = trajectory(reference.step_, name, bits, param, grads)
            for isa in isas():
                monkeypatch.setattr(cpu, "isa", lambda isa=isa: isa)
                found = trajectory(cpu.step_, name, bits, param, grads)
                assert all(map(torch.equal, found, expected)), (cpu.ISAS[isa], param_dtype, grad_dtype)


@compiled
@pytest.mark.parametrize("weight_bits", [8, 4])
@EVERY_FORM
def test_quantised_weights_equal_the_definition(name, bits, weight_bits, monkeypatch):
    for numel, dtype in itertools.product((1, 129, 9000), DTYPES):
        start = quantize(random_weights(numel, seed=1) * (torch.arange(numel) % 300 > BLOCK), weight_bits)

        def update(step_, start=start, numel=numel, dtype=dtype) -> list[torch.Tensor]:
            codes, scale, states = start.codes.clone(), start.scale.clone(), new_states(name, bits, numel)
            for step in (1, 2, 3):
                step_(codes, gradient(numel, step, dtype), *states, scalars_of(name, step), bits, scale)
            return [tensor.view(torch.uint8) for tensor in (codes, scale, *states) if tensor is not None]

        expected = update(reference.step_)
        for isa in isas():
            monkeypatch.setattr(cpu, "isa", lambda isa=isa: isa)
            assert all(map(torch.equal, update(cpu.step_), expected)), (cpu.ISAS[isa], numel, dtype)


@compiled
@EVERY_FORM
def test_states_that_decay_to_nothing_equal_the_definition(name, bits, monkeypatch):
    """Without gradients, until scales fall below the smallest normal number of fp32."""
    param = random_weights(3 * BLOCK, seed=2)
    # The first decays 56-fold (exp_avg_sq and Lion's exp_avg) in 400 steps: from above to below 2^-126 * 127^2, * 49, * 1 as exp_avg
    # of Lion, and 2^-126 as exp_avg_sq. AdamW's exp_avg vanishes in all.
    first = {"lion": [1e-31, 1e-33, 1e-35], "adamw": [3e-19, 3e-18, 1e-17]}[name]
    grads = [torch.tensor(first).repeat_interleave(BLOCK), *[torch.zeros(3 * BLOCK)] * 400]
    expected = trajectory(reference.step_, name, bits, param, grads)
    for isa in isas():
        monkeypatch.setattr(cpu, "isa", lambda isa=isa: isa)
        assert all(map(torch.equal, trajectory(cpu.step_, name, bits, param, grads), expected)), cpu.ISAS[isa]


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
@EVERY_FORM
def test_any_number_of_threads_gives_the_same_bits(name, bits, threads):
    numel = 40037  # 313 blocks: parts for four threads
    param, grads = random_weights(numel, seed=3), [gradient(numel, step, torch.float32) for step in (1, 2, 3)]
    expected = trajectory(reference.step_, name, bits, param, grads)
    torch.set_num_threads(threads)
    assert all(map(torch.equal, trajectory(cpu.step_, name, bits, param, grads), expected))


def decoded(states: list[torch.Tensor | None], bits: int) -> list[torch.Tensor]:
    """exp_avg and, if there, exp_avg_sq as fp32."""
    if bits == 32:
        return [state.clone() for state in states[:2] if state is not None]
    pairs = zip(states[:2], states[2:], (reference.decode_signed, reference.decode_unsigned), strict=True)
    rows = [(codes.view(-1, BLOCK * bits // 8), scale, decode) for codes, scale, decode in pairs if codes is not None]
    return [decode(codes, scale, FORMATS[bits]).flatten() for codes, scale, decode in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_FORM
def test_bad_gradients_leave_their_numbers_and_no_others(name, bits, dtype):
    bad = BAD if name == "adamw" else BAD[:3]  # Lion squares nothing
    random = torch.Generator().manual_seed(5)
    # With gradients of one sign every weight moves by about 0.02, and bf16 weights below 1 are at most 2^-8 apart
    param, states = torch.rand(4 * BLOCK, generator=random).to(dtype), new_states(name, bits, 4 * BLOCK)
    for step in (1, 2, 3):
        cpu.step_(param, torch.rand(4 * BLOCK, generator=random) + 0.5, *states, scalars_of(name, step), bits)
    weight_before, states_before = param.clone(), decoded(states, bits)
    grad = torch.rand(4 * BLOCK, generator=random) + 0.5
    places = torch.arange(len(bad)) * 97 + 5
    grad[places] = torch.tensor(bad)
    cpu.step_(param, grad, *states, scalars_of(name, 4), bits)
    assert (param == weight_before).nonzero().flatten().tolist() == places.tolist()
    # Encoding moves a state by less than the distance of two codes. exp_avg: c^2 and (c + 1)^2 differ by 2 sqrt(c^2) + 1 scales.
    # exp_avg_sq: a code is at most 1/16, or 1/2, above its neighbour, or the smallest value.
    for index, (after, before) in enumerate(zip(decoded(states, bits), states_before, strict=True)):
        assert after.isfinite().all()
        change = (after - before)[places].abs()
        if bits == 32:
            assert change.max() == 0
            continue
        scale = states[2 + index].repeat_interleave(BLOCK)[places]
        if index == 0:
            allowed = (2 * (before[places].abs() / scale).sqrt() + 1 + 1e-3) * scale
        else:
            allowed = 1.001 * (before[places] / (16 if bits == 8 else 2)).maximum(scale / (6e4 if bits == 8 else 170))
        assert (change <= allowed).all()


@pytest.mark.parametrize("name, expected", [("baseline", 0), ("avx2", 1), ("avx512", 2), ("unknown", 2)])
def test_the_environment_lowers_the_instruction_set(name, expected, monkeypatch):
    monkeypatch.setenv("LOWMEM_CPU_ISA", name)
    assert cpu.isa.__wrapped__() == min(expected, max(isas(), default=0))


def test_without_compiled_kernels_the_definition_runs_after_one_warning(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    cpu._warn_once.cache_clear()
    param, grads = random_weights(300, seed=4), [gradient(300, step, torch.float32) for step in (1, 2)]
    with pytest.warns(UserWarning, match=r"not compiled.*install a C\+\+ compiler") as caught:
        found = trajectory(cpu.step_, "adamw", 8, param, grads)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trajectory(cpu.step_, "adamw", 8, param, grads)
    assert all(map(torch.equal, found, trajectory(reference.step_, "adamw", 8, param, grads)))
    cpu._warn_once.cache_clear()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_kernels_are_compiled():
    assert cpu.problem() == ""


MEASURE = """
import sys, warnings
import torch
from lowmem.memory.procfs import reset_high_water_mark, status_bytes
from lowmem.optim import AdamW

warnings.simplefilter("error")
torch.set_num_threads(2)
dtype, bits, numel = getattr(torch, sys.argv[1]), int(sys.argv[2]), 1 << 26

def parameter(numel):
    weight = torch.nn.Parameter(torch.ones(numel // 128, 128, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    return weight

small = parameter(1 << 16)
AdamW([small], state_bits=bits).step()  # libraries, threads and their stacks
large = parameter(numel)
optimizer = AdamW([large], state_bits=bits)
optimizer.step()  # allocates the states
assert reset_high_water_mark()
before = status_bytes()["VmRSS"]
for _ in range(2):
    optimizer.step()
print(status_bytes()["VmHWM"] - before)
"""


@compiled
@pytest.mark.memory
@pytest.mark.skipif("VmHWM" not in (status_bytes() or {}), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype, bits", [("bfloat16", 8), ("float32", 4)])
def test_a_step_on_64_million_numbers_adds_less_than_a_megabyte(dtype, bits):
    result = subprocess.run([sys.executable, "-c", MEASURE, dtype, str(bits)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1_000_000  # an fp32 copy of one tensor would be 268 million
