"""The ranks of a run that DeepSpeed's launcher started: who this process is, how the ranks meet and how they part."""

import gc
import logging
import os
import re
import socket
import sys
import time
import warnings
from datetime import timedelta
from types import ModuleType
from typing import NoReturn

import torch

from lowmem.system.errors import ConfigError

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# A rank may wait while another one tokenises a corpus. Hanging is no danger: the launcher ends all ranks when one dies.
_TIMEOUT = timedelta(hours=12)
_LAUNCHER_PATIENCE_S = 60.0
_PEER_FAILURE = re.compile(r"connection (closed|reset)|broken pipe|timed out waiting|remote process exited", re.IGNORECASE)
# DeepSpeed warns about what lowmem does on purpose or reports itself.
_EXPECTED_MESSAGES = ("**** You are using ZeRO with an untested optimizer", "[deepspeed] OVERFLOW!")

# PyTorch 2.13 has new names for two collectives that DeepSpeed calls by the old ones.
_RENAMED_COLLECTIVES = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor|_all_gather_base|_reduce_scatter_base)`"


def launched_by_deepspeed() -> bool:
    """Whether this process is one rank of a launch: `deepspeed script.py`, or a launcher that sets the same variables."""
    return all(name in os.environ for name in _LAUNCHER_VARIABLES)


def rank() -> int:
    """This process among all ranks; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes share the global batch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among the ranks of this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")  # DeepSpeed's name, torchrun's name


def rank_device(device: torch.device) -> torch.device:
    """The device of this rank where the run computes on `device`: each rank of a machine has its own GPU."""
    return torch.device("cuda", local_rank()) if device.type == "cuda" and launched_by_deepspeed() else device


def import_deepspeed(device_type: str, *, debug: bool = False) -> ModuleType:
    """DeepSpeed for one kind of device, with its log on standard error, warnings and worse only.

    Args:
        device_type: cpu or cuda; DeepSpeed decides once per process.
        debug: let DeepSpeed say everything.
    Raises:
        ConfigError: it is not installed, or was already set up for another device.
    """
    # Without this DeepSpeed guesses, and warns that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"engine.name is deepspeed, which cannot be imported ({error}); run: pip install 'lowmem[deepspeed]'") from error
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != device_type:
        raise ConfigError(
            f"DeepSpeed is set up for {get_accelerator().device_name()}, the run computes on {device_type}; unset DS_ACCELERATOR"
        )
    warnings.filterwarnings("ignore", message=_RENAMED_COLLECTIVES, category=FutureWarning)
    _quieten(deepspeed.utils.logger, debug)
    _import_muon_uncompiled()
    return deepspeed


def init_process_group(device: torch.device, *, debug: bool = False) -> None:
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs. Does nothing when they have met.

    Without a launcher this process is the only rank.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    deepspeed = import_deepspeed(device.type, debug=debug)
    if torch.distributed.is_initialized() and deepspeed.comm.is_initialized():
        return
    if not launched_by_deepspeed():
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        os.environ.update(alone)
    # DeepSpeed would compile an operator here (half a minute), print to standard output and reserve shared memory, all for
    # an inference all-reduce that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # init_distributed takes an existing group of another owner without asking, so only a closed one leads here again.
    deepspeed.comm.comm.cdb = None
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False, timeout=_TIMEOUT)


def destroy_process_group() -> None:
    """Part from the other ranks; PyTorch warns at exit about a group that is still open. Does nothing without a group."""
    if not torch.distributed.is_initialized():
        return
    import deepspeed

    torch.distributed.barrier()  # rank 0 holds the store through which the others say goodbye
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    # Reference cycles keep groups, and their threads, alive. A thread that asks for the interpreter while it shuts down aborts the
    # process, after everything was done right.
    gc.collect()


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone away."""
    return isinstance(error, RuntimeError) and world_size() > 1 and bool(_PEER_FAILURE.search(str(error)))


def wait_for_launcher() -> None:
    """Wait to be ended by the launcher, which saw the rank that failed: its message and its exit code are the ones that count."""
    time.sleep(_LAUNCHER_PATIENCE_S)


def leave(code: int) -> NoReturn:
    """End this process; at once if ranks are still connected, because parting politely would wait for ranks that are stuck."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _quieten(logger: logging.Logger, debug: bool) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    for handler in logger.handlers:
        handler.setLevel(logger.level)
        if type(handler) is logging.StreamHandler:  # its own, not one that a program or a test added
            handler.setStream(sys.stderr)  # standard output belongs to --json
    if not debug and _is_unexpected not in logger.filters:
        logger.addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(expected in message for expected in _EXPECTED_MESSAGES)


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which every ZeRO stage imports, without the compiler it asks for at import.

    lowmem offers no Muon; torch.compile would cost each rank 115 MiB and 1.6 s for it.
    """
    if "deepspeed.runtime.zero.muon.original_muon" in sys.modules:
        return
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda *args, **options: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    except ImportError:  # older DeepSpeed has no Muon
        pass
    finally:
        compiler.compile = compile_function


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
