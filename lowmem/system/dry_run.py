"""What code does differently on fake tensors, which have a shape, a dtype and no numbers.

A dry run drives the engine that trains on such tensors and records what would be allocated. Code asks here for the kind of device it
computes on, and runs loops whose passes all allocate the same for one pass only.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
_pretended: ContextVar[str | None] = ContextVar("lowmem_pretended_device", default=None)
_listener: ContextVar[Callable[[Sequence[torch.Tensor], str], None] | None] = ContextVar("lowmem_listener", default=None)
_repeats: ContextVar[int] = ContextVar("lowmem_repeats", default=1)


def is_fake(x: torch.Tensor) -> bool:
    """True for tensors without data, whose values must not be asked for: on the meta device, or under FakeTensorMode."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return x.is_meta or (module is not None and isinstance(x, module.FakeTensor))


def device_kind(x: torch.Tensor) -> str:
    """ "cpu", "cuda", ...: where `x` is, or where a dry run pretends it to be.

    Autograd cannot run on fake CUDA tensors where PyTorch was built without CUDA, so a dry run for a GPU uses fake CPU tensors.
    """
    return _pretended.get() or x.device.type


def autocast_kind(x: torch.Tensor) -> str:
    """The kind of device whose autocast `x` obeys: its own, or the CPU's, which has every dtype, in a dry run."""
    return "cpu" if is_fake(x) else x.device.type


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves initial weights on the meta device as they are: torch would import sympy, 31 MB, to draw numbers that nobody sees."""

    drawn = frozenset(
        getattr(owner, name)
        for owner in (torch.nn.init, torch.Tensor)
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_")
        if hasattr(owner, name)
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in self.drawn:
            tensor = args[0] if args else named["tensor"]  # torch.nn.init names it on the way here
            if tensor.is_meta:
                return tensor
        return func(*args, **named)


@contextmanager
def on_meta() -> Iterator[None]:
    """Make new tensors on the meta device, and draw no initial weights there."""
    with torch.device("meta"), _NoRandomNumbers():
        yield


@contextmanager
def pretend_device(kind: str | None) -> Iterator[None]:
    """Have `device_kind` answer `kind`; None pretends nothing."""
    token = _pretended.set(kind)
    try:
        yield
    finally:
        _pretended.reset(token)


def representative(items: Sequence[T], like: torch.Tensor, distinct: int = 1) -> Iterator[T]:
    """The items; on fake tensors only the first `distinct`, the last of which stands for all that follow it.

    Args:
        items: of a loop whose passes from number `distinct` on allocate what that one allocates.
        like: tells whether this is a dry run.
    """
    if not is_fake(like) or len(items) <= distinct:
        yield from items
        return
    yield from items[: distinct - 1]
    outer = _repeats.get()
    _repeats.set(outer * (len(items) - distinct + 1))
    try:
        yield items[distinct - 1]
    finally:
        _repeats.set(outer)


def note(tensor: torch.Tensor, category: str) -> None:
    """Tell the dry run in progress, if there is one, what a tensor is for."""
    listener = _listener.get()
    if listener is not None:
        listener([tensor], category)


@contextmanager
def listen(listener: Callable[[Sequence[torch.Tensor], str], None]) -> Iterator[None]:
    """Have `listener` told what `note` says."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def repeats() -> int:
    """How many passes the present one stands for; 1 outside of `representative`."""
    return _repeats.get()
