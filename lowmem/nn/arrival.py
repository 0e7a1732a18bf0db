"""Layers that change their weight the moment they are given it, so that a model is never whole as its files have it while it is read."""

from collections.abc import Callable
from typing import Any

from torch import nn

_TAKE = "_lowmem_take"  # kept by the layer: classes outlive it until cycles are collected, and would keep the model alive


def on_arrival(layer: nn.Module, take: Callable[[nn.Module, nn.Parameter], nn.Parameter | None]) -> Callable[[], None]:
    """Have `take` say what `layer` keeps of the weight that transformers reads for it next; None keeps nothing.

    Returns:
        What makes the layer an ordinary one again where no weight came, as to a head that shares its embedding's.
    """
    kind = type(layer)

    def arrive(layer: nn.Module, name: str, value: Any) -> None:
        # transformers marks what it has read; a shared weight comes as the subclass that it has become
        if name == "weight" and type(value) is nn.Parameter and getattr(value, "_is_hf_initialized", False) and not value.is_meta:
            layer.__class__ = kind
            value = layer.__dict__.pop(_TAKE)(layer, value)
            if value is None:
                return
            value._is_hf_initialized = True  # transformers would draw it at random otherwise
        kind.__setattr__(layer, name, value)

    def settle() -> None:
        if _TAKE in layer.__dict__:
            del layer.__dict__[_TAKE]
            layer.__class__ = kind

    layer.__dict__[_TAKE] = take
    layer.__class__ = type(kind.__name__, (kind,), {"__setattr__": arrive, "__module__": kind.__module__})
    return settle
