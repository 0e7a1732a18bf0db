"""The Triton kernel equals the definition to the last bit: here in Triton's interpreter on a CPU; tests/gpu has the same on CUDA.

Triton reads TRITON_INTERPRET when it is imported. So the tests marked `interpreted` are skipped here, and run in a process of their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

from lowmem.nn.quantized import quantize
from lowmem.optim.kernels import reference
from lowmem.optim.kernels import triton as kernels
from lowmem.optim.kernels.formats import BLOCK, FORMATS
from tests.optim.kernels.cases import EVERY_FORM, gradient, new_states, random_weights, scalars_of
from tests.optim.kernels.triton_cases import DTYPES, any_codes, decaying_case, huge_case, make_scalars, subnormal_case, weights_at_the_edges

IS_INTERPRETED, IS_INSTALLED = os.environ.get("TRITON_INTERPRET") == "1", importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")  # numpy's, in the interpreter
compiles = pytest.mark.skipif(IS_INTERPRETED or not IS_INSTALLED, reason="Triton is not installed, or interprets")
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")


@compiles
def test_the_kernel_equals_the_definition_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= 100, result.stdout


def assert_equal_steps(name: str, bits: int, param: torch.Tensor, grads, scalars=None, states=None) -> list[torch.Tensor | None]:
    """Both run on the device of `param`; returns the weight and the states after the last step."""
    states = [None if state is None else state.to(param.device) for state in states or new_states(name, bits, param.numel())]
    found, expected = [[None if tensor is None else tensor.clone() for tensor in (param, *states)] for _ in range(2)]
    for step, grad in enumerate(grads, start=1):
        numbers = scalars[step - 1] if scalars else scalars_of(name, step)
        kernels.step_(found[0], grad, *found[1:], numbers, bits)
        reference.step_(expected[0], grad, *expected[1:], numbers, bits)
        for what, one, other in zip(("param", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"), found, expected, strict=True):
            if one is not None:
                different = (one.view(torch.uint8) != other.view(torch.uint8)).nonzero().flatten()
                assert not len(different), f"{what} of {param.dtype}, gradient of {grad.dtype}, step {step}: bytes {different[:9].tolist()}"
    return found


@interpreted
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_FORM
def test_every_dtype(name, bits, dtype, grad_dtype):
    """Ten blocks: of all magnitudes, of zeros, of zeros after the first step, with NaN, infinite and huge gradients."""
    numel = 9 * BLOCK + 50
    assert_equal_steps(name, bits, random_weights(numel, seed=1).to(dtype), [gradient(numel, step, grad_dtype) for step in (1, 2, 3)])


@interpreted
@pytest.mark.parametrize("numel", [0, 1, 127, 128, 129, 5000])
@EVERY_FORM
def test_every_length(name, bits, numel):
    dtype = DTYPES[numel % 3]
    assert_equal_steps(name, bits, random_weights(numel, seed=2).to(dtype), [gradient(numel, step, dtype) for step in (1, 2, 3)])


@interpreted
@EVERY_FORM
def test_states_that_decay_to_nothing(name, bits):
    assert_equal_steps(name, bits, *decaying_case(name))


@interpreted
@EVERY_FORM
def test_huge_gradients(name, bits):
    assert_equal_steps(name, bits, *huge_case(name))


@interpreted
@EVERY_FORM
def test_subnormal_numbers(name, bits):
    assert_equal_steps(name, bits, *subnormal_case(name))


@interpreted
@EVERY_FORM
def test_no_learning_rate_and_a_million_steps(name, bits):
    scalars = [make_scalars(name, 1, lr=0.0), make_scalars(name, 1_000_000)]
    assert_equal_steps(name, bits, random_weights(300, seed=5).bfloat16(), [gradient(300, step, torch.float32) for step in (1, 2)], scalars)


@interpreted
@EVERY_FORM
def test_any_codes(name, bits):
    assert bits == 32 or FORMATS[bits].code_bytes(1100) > 1100 * bits // 8
    grads = [gradient(1100, step, torch.bfloat16) for step in (1, 2)]
    assert_equal_steps(name, bits, random_weights(1100, seed=7), grads, states=any_codes(name, bits, 1100))


@interpreted
@pytest.mark.parametrize("weight_bits", [8, 4])
@EVERY_FORM
def test_quantised_weights(name, bits, weight_bits):
    """Gradients that make the weights of a block huge, none that are zero, and the last block cut short."""
    numel = 9 * BLOCK + 50
    weight = quantize(random_weights(numel, seed=1) * (torch.arange(numel) > BLOCK), weight_bits)
    pairs = [[tensor.clone() for tensor in (weight.codes, weight.scale)] for _ in range(2)]
    states = [new_states(name, bits, numel) for _ in range(2)]
    for step in (1, 2, 3):
        for step_, (codes, scale), own in zip((kernels.step_, reference.step_), pairs, states, strict=True):
            step_(codes, gradient(numel, step, DTYPES[bits % 3]), *own, scalars_of(name, step), bits, scale)
    for one, other in zip([*pairs[0], *states[0]], [*pairs[1], *states[1]], strict=True):
        assert one is other is None or torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert not torch.equal(pairs[0][0], weight.codes)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_FORM
def test_weights_at_the_edges_of_their_dtype(name, bits, dtype):
    param = weights_at_the_edges()
    grads = [torch.sign(random_weights(len(param), seed)) for seed in (8, 9)]
    assert_equal_steps(name, bits, param.to(dtype), grads, [make_scalars(name, step, lr=lr) for step, lr in ((1, 0.0), (2, 1e-7))])


@interpreted
@pytest.mark.parametrize("bits_of_nan", [0x7FC00000, 0x7FFFFFFF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_a_number_stays_so(dtype, bits_of_nan):
    """CUDA's NaN is 0x7FFFFFFF: random bits added to it make -0."""
    param = torch.full((BLOCK,), bits_of_nan, dtype=torch.int32).view(torch.float32).to(dtype)
    kernels.step_(param, torch.ones(BLOCK), *new_states("adamw", 8, BLOCK), make_scalars("adamw", 1), 8)
    assert param.isnan().all()


class Launches:
    """Stands for the kernel and keeps what it is launched with."""

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *arguments, **options):
        self.arguments, self.options = arguments, options


def ptx(launch: Launches, kernel, capability: int, **changed: bool) -> str:
    """Assembly of the kernel as it was launched, compiled without a device."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    signature, constants = {}, {}
    for index, (parameter, argument) in enumerate(zip(kernel.params, launch.arguments, strict=True)):
        is_constant = parameter.is_constexpr or argument is None
        signature[parameter.name] = "constexpr" if is_constant else mangle_type(argument)
        if is_constant:
            constants[(index,)] = argument
    source = ASTSource(kernel, signature, constants)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={**launch.options, **changed}).asm["ptx"]


@compiles
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("name, bits, dtype", [("adamw", 8, torch.bfloat16), ("adamw", 32, torch.float32), ("lion", 4, torch.float16)])
def test_the_compiled_arithmetic_rounds_after_every_operation(name, bits, dtype, capability, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, launch = kernels._step, Launches()
    monkeypatch.setattr(kernels, "_step", launch)
    kernels.step_(torch.zeros(500, dtype=dtype), torch.zeros(500), *new_states(name, bits, 500), make_scalars(name, 1), bits)
    # tl.floor flushes subnormal numbers, which makes no difference
    inexact = re.compile(r"\b(?:fma|(?:div|sqrt)\.(?:full|approx)|(?:div|sqrt|add|sub|mul)\.rn\.ftz)\.")
    assert not inexact.findall(ptx(launch, kernel, capability))
    assert inexact.findall(ptx(launch, kernel, capability, enable_fp_fusion=True))


class NoCompiler(Launches):
    def _launch(self, *arguments, **options):
        raise RuntimeError("Failed to find C compiler")


def test_the_definition_runs_where_the_kernel_cannot_start(monkeypatch):
    monkeypatch.setattr(kernels, "_step", NoCompiler())
    monkeypatch.setattr(kernels, "_without_kernel", set())
    with pytest.warns(UserWarning, match=r"C compiler; the plain PyTorch definition .* many times slower; install a C compiler \(gcc"):
        assert_equal_steps("adamw", 8, random_weights(300, seed=1), [gradient(300, 1, torch.float32)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_steps("adamw", 8, random_weights(300, seed=1), [gradient(300, 2, torch.float32)])


def test_the_definition_runs_without_triton():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, warnings
        from lowmem.optim.kernels import triton as kernels
        from lowmem.optim.kernels.formats import lion_scalars
        scalars = lion_scalars(lr=1, betas=(0.9, 0.9), weight_decay=0)
        with warnings.catch_warnings(record=True) as found:
            for _ in range(2):
                weight = torch.ones(3)
                kernels.step_(weight, torch.ones(3), torch.zeros(3), None, None, None, scalars, 32)
                assert weight.tolist() == [0, 0, 0]
        print(*[warning.message for warning in found])
    """
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    problem = "Triton is not installed; the plain PyTorch definition of the optimizer step runs instead, many times slower"
    assert result.stdout.strip() == f"{problem}; install Triton (pip install triton)"
