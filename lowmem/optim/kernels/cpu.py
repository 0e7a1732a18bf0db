"""The C++ kernels, loaded with ctypes: they link neither Python nor PyTorch, so one build serves every version of both."""

import ctypes
import functools
import importlib.machinery
import os
import warnings
from pathlib import Path

import torch

from lowmem.optim.kernels import reference
from lowmem.optim.kernels.formats import StepScalars

ABI = 2  # of csrc/optim.cpp
_OPENMP = ("libgomp.so.1", "libomp.so", "libomp.so.5")  # GCC's, and Clang's
ISAS = ("baseline", "avx2", "avx512")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
_FLOATS = ("step_size", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "rsqrt_correction2", "grad_scale")


class _Scalars(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_float) for name in _FLOATS), ("key", ctypes.c_uint32), ("offset", ctypes.c_int64)]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they were not built, or by another version of lowmem.

    They are linked with no OpenMP library: its functions are those of the one that PyTorch has loaded, so that there is one pool of
    threads. Where PyTorch brings none, the system's is loaded first.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_cpu" + suffix)
        if path.is_file():
            kernels = _load(str(path))
            for name in _OPENMP:
                if kernels is None and _load(name, ctypes.RTLD_GLOBAL) is not None:
                    kernels = _load(str(path))
            return kernels if kernels is not None and _abi(kernels) == ABI else None
    return None


def _load(path: str, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path, mode=mode)
    except OSError:
        return None


def _abi(kernels: ctypes.CDLL) -> int:
    """What the library says that it does; 0 before it said so."""
    complete = all(hasattr(kernels, name) for name in ("lowmem_abi", "lowmem_best_isa", "lowmem_update"))
    return kernels.lowmem_abi() if complete else 0


def problem() -> str:
    """Why the compiled kernels cannot be used; empty when they can."""
    if library() is not None:
        return ""
    return (
        "lowmem's CPU optimizer kernels are not compiled, or by another version of lowmem: the plain PyTorch definition runs instead, "
        "tens of times slower; install a C++ compiler (g++ or clang++) and run pip install again "
        "(in a checkout: python setup.py build_ext --inplace)"
    )


@functools.cache
def isa() -> int:
    """Index in ISAS of the instruction set in use; the environment variable LOWMEM_CPU_ISA=avx2 lowers it."""
    kernels = library()
    best: int = 0 if kernels is None else kernels.lowmem_best_isa()
    wanted = os.environ.get("LOWMEM_CPU_ISA", ISAS[best])
    return min(best, ISAS.index(wanted)) if wanted in ISAS else best


@functools.cache
def _warn_once() -> None:
    warnings.warn(problem(), stacklevel=2)


def step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor | None,
    exp_avg_scale: torch.Tensor | None,
    exp_avg_sq_scale: torch.Tensor | None,
    scalars: StepScalars,
    bits: int,
    param_scale: torch.Tensor | None = None,
) -> None:
    """See `lowmem.optim.kernels.reference.step_`; fp16 and missing kernels run that one.

    Memory: 3 KiB of stack per thread.
    """
    kernels = library()
    if kernels is None:
        _warn_once()
    if kernels is None or param.dtype not in _DTYPES or grad.dtype not in _DTYPES:
        reference.step_(param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, scalars, bits, param_scale)
        return
    numbers = _Scalars(*(getattr(scalars, name) for name in _FLOATS), scalars.key, scalars.offset)
    failed = kernels.lowmem_update(
        isa(), torch.get_num_threads(), int(exp_avg_sq is None), bits, _DTYPES[param.dtype], _DTYPES[grad.dtype],
        _pointer(param), _pointer(param_scale), _pointer(grad),
        _pointer(exp_avg), _pointer(exp_avg_scale), _pointer(exp_avg_sq), _pointer(exp_avg_sq_scale),
        ctypes.c_int64(grad.numel()), ctypes.byref(numbers),
    )  # fmt: skip
    assert not failed


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
