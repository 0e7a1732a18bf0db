"""Blocks of a model that are taken over one by one while a library fills it with weights, so that it is never whole."""

from typing import Any

from torch import nn

from lowmem.models.base import Place


class Arrivals:
    """Watches modules on the meta device until they are given parameters with elements.

    Args:
        place: is given each block as soon as all of it is there.
    Memory: the blocks whose weights are there in part.
    """

    def __init__(self, place: Place):
        self._place = place
        self._blocks: list[nn.Module] = []
        self._owners: dict[int, int] = {}
        self._missing: set[int] = set()
        self._watching: dict[type, type] = {}

    def watch(self, blocks: nn.ModuleList) -> None:
        """Expect the weights of these blocks, in any order."""
        self._blocks, self._missing = list(blocks), set(range(len(blocks)))
        for index, block in enumerate(blocks):
            for module in block.modules():
                self._owners[id(module)] = index
                module.__class__ = self._watched(type(module))

    def finish(self, model: nn.Module) -> None:
        """Place what is left, watch no more, and have the rest of the model where its blocks are computed."""
        for index in sorted(self._missing):
            self._place(self._blocks[index], index)
        self._missing.clear()
        usual = {watched: kind for kind, watched in self._watching.items()}
        for block in self._blocks:
            for module in block.modules():
                object.__setattr__(module, "__class__", usual.get(type(module), type(module)))
        model.to(next(self._blocks[0].parameters()).device)  # of what stands for the elements that went elsewhere
        self._blocks, self._owners = [], {}  # classes outlive this, until cycles are collected, and must not hold the model

    def _watched(self, kind: type) -> type:
        if kind not in self._watching:

            def arrive(module: nn.Module, name: str, value: Any) -> None:
                kind.__setattr__(module, name, value)  # type: ignore[call-arg, arg-type]
                if not isinstance(value, nn.Parameter) or value.is_meta:
                    return
                if type(module) is not watched:  # what it was given has made it another kind of layer
                    object.__setattr__(module, "__class__", self._watched(type(module)))
                self._arrived(self._owners[id(module)])

            watched = type(kind.__name__, (kind,), {"__setattr__": arrive, "__module__": kind.__module__})
            self._watching[kind] = watched
        return self._watching[kind]

    def _arrived(self, index: int) -> None:
        if index in self._missing and not any(parameter.is_meta for parameter in self._blocks[index].parameters()):
            self._missing.discard(index)
            self._place(self._blocks[index], index)
