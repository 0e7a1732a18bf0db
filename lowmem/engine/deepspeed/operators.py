"""Compile the DeepSpeed operators that offload needs, ahead of a run: `python -m lowmem.engine.deepspeed.operators`.

DeepSpeed compiles them at first use, silently, and each rank of a launch tries at once. Plain ZeRO stages need none.
"""

import fcntl
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lowmem.engine.deepspeed.processes import import_deepspeed
from lowmem.system.errors import ConfigError, LowmemError
from lowmem.system.files import storage_errors

# Builder class by operator, and about how long it compiles on two cores.
_OPERATORS = {"cpu_adam": ("CPUAdamBuilder", 110), "cpu_lion": ("CPULionBuilder", 55)}

_POLL_S = 0.5

OpStatus = Literal["built", "not built", "cannot be built"]


def deepspeed_op_status(device_type: str = "cpu") -> dict[str, OpStatus]:
    """Whether the operators of offload are compiled, by name. Compiles nothing.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    import_deepspeed(device_type)
    return {name: _status(_builder(builder)) for name, (builder, _) in _OPERATORS.items()}


def build_deepspeed_ops(device_type: str = "cpu", report: Callable[[str], Any] = print) -> list[str]:
    """Compile what is missing, and return the names of what was compiled; quick when there is nothing to do.

    Args:
        report: gets a line before and after each compilation.
    Raises:
        ConfigError: DeepSpeed is not installed, or the compiler failed; the message says what to install.
    """
    import_deepspeed(device_type)
    put_ninja_on_path()
    compiled = []
    for name, (builder_name, seconds) in _OPERATORS.items():
        builder = _builder(builder_name)
        wait_for_build(_library(builder).parent, report)
        if _status(builder) == "built":
            continue
        report(f"{name}: compiling, about {seconds} s on two cores")
        start = time.monotonic()
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            raise ConfigError(
                f"DeepSpeed's operator {name} does not compile ({reason}); it needs g++ and ninja (apt-get install g++; "
                "pip install ninja), or use engine.offload=none"
            ) from error
        report(f"{name}: compiled in {time.monotonic() - start:.0f} s")
        compiled.append(name)
    return compiled


def wait_for_build(folder: Path, report: Callable[[str], Any]) -> None:
    """Until nobody builds in `folder`; a lock that a killed build left there is removed.

    PyTorch's lock is a file that is there as long as somebody builds, who keeps it open: one that nobody has open would be waited for
    for ever, also where the operator is compiled and only loaded.

    Args:
        report: gets a line when there is something to wait for, or to remove.
    Raises:
        ConfigError: who has it open cannot be known; the message names the file.
        StorageError: it cannot be removed.
    """
    lock, waiting = folder / "lock", 0
    while lock.exists():
        holder = _holder(lock)
        if holder and holder != waiting:
            report(f"{folder.name}: waiting for process {holder}, which compiles it")
            waiting = holder
        if holder:
            time.sleep(_POLL_S)
            continue
        with storage_errors(folder), open(folder / ".lowmem-lock", "w") as mine:
            fcntl.flock(mine, fcntl.LOCK_EX)  # of several that find the same lock one removes it
            if lock.exists() and not _holder(lock):
                lock.unlink()
                report(f"{folder.name}: removed {lock}, which a build that was killed has left")


def _holder(lock: Path) -> int:
    """A process that has the lock open; 0 if there is none.

    Raises:
        ConfigError: this system, or another user's lock, does not tell.
    """
    try:
        wanted = lock.stat()
        processes = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    except FileNotFoundError:
        return 0
    if not processes or (wanted.st_uid != os.getuid() and os.getuid()):
        raise ConfigError(f"another build has left {lock}, or is still there; if nothing compiles, remove that file")
    for process in processes:
        try:
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                found = os.stat(f"/proc/{process}/fd/{descriptor}")
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return process
        except OSError:  # it has ended, or is another user's
            continue
    return 0


def _builder(name: str) -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder(name)


def _status(builder: Any) -> OpStatus:
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get(builder.name, False) or _library(builder).exists():
        return "built"
    return "not built" if builder.is_compatible(verbose=False) else "cannot be built"


def _library(builder: Any) -> Path:
    """Where PyTorch puts the compiled operator: a cache keyed by Python and device, which TORCH_EXTENSIONS_DIR moves."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(builder.name, verbose=False)) / f"{builder.name}.so"


def put_ninja_on_path() -> None:
    """Make ninja callable: it is installed beside this Python, which need not be on PATH when it was called by its full name.

    PyTorch asks for it even to load an operator that is compiled.
    """
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ.get("PATH", "")


def main() -> int:
    """Compile, print what was done, return the exit code."""
    try:
        build_deepspeed_ops()
        status = deepspeed_op_status()
    except LowmemError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(", ".join(f"{name}: {state}" for name, state in status.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
