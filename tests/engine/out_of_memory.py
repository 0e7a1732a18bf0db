"""Memory that runs out at a chosen operation, for tests of recovery; and what an engine holds, to the bit."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.engine.local import LocalEngine
from lowmem.engine.state import optimizer_tensors

MESSAGE = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


class MemoryRunsOut(TorchDispatchMode):
    """Counts the operations that return new memory, and has number `at` of them fail; 0 fails never.

    Attributes:
        count: operations so far.
        failed: the operation that did.
    """

    def __init__(self, at: int = 0):
        super().__init__()
        self.at, self.count, self.failed = at, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if new_bytes(result, (args, kwargs)):
            self.count += 1
            if self.count == self.at:
                self.failed = str(func)
                raise RuntimeError(MESSAGE)
        return result


class NothingLargerThan(TorchDispatchMode):
    """Has operations fail that return more than `limit_bytes` of new memory."""

    def __init__(self, limit_bytes: int):
        super().__init__()
        self.limit_bytes = limit_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if new_bytes(result, (args, kwargs)) > self.limit_bytes:
            raise RuntimeError(MESSAGE)
        return result


def new_bytes(result: Any, arguments: Any) -> int:
    """Of the storages in `result` that are not among the arguments'."""
    known = {x.untyped_storage()._cdata for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
    return sum(size for storage, size in found.items() if storage not in known)


def bits(engine: LocalEngine) -> dict[str, Any]:
    """Weights and optimizer states as they lie in memory, and the states that are plain numbers."""
    tensors, scalars = optimizer_tensors(engine.model, engine.optimizer)
    tensors |= {f"weights of {name}": parameter for name, parameter in engine.model.named_parameters()}
    raw = {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return raw | scalars
