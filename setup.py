"""Compiles the CPU optimizer kernels; everything else is in pyproject.toml. Without a compiler lowmem installs and works, slower."""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No fused multiply-add and no reordering: results equal the Python definition to the bit.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


class BuildKernels(build_ext):
    """With OpenMP where the compiler has it, on one thread where not; linked with none, see `lowmem.optim.kernels.cpu.library`."""

    def build_extension(self, ext: Extension) -> None:
        try:
            ext.extra_compile_args = [*FLAGS, "-fopenmp"]
            super().build_extension(ext)
        except Exception as error:
            print(f"lowmem: compiling the kernels with OpenMP failed ({error}); trying without", file=sys.stderr)
            ext.extra_compile_args = FLAGS
            super().build_extension(ext)


kernels = Extension(
    "lowmem.optim.kernels._cpu",
    sources=["lowmem/optim/kernels/csrc/optim.cpp"],
    depends=["lowmem/optim/kernels/csrc/step.inc"],
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
