"""Activation checkpointing: what a block keeps for backward, and what it computes again.

none: everything that backward reads.
block: only the block's input; the whole forward runs again.
selective: the outputs of matrix products and of attention, and the residual stream; norms and activation functions,
    marked with `cheap`, run again. For a Llama-like block of width C and hidden width F that is, per token:

        kept always                    numbers      kept by none only          numbers
        block input, after attention   2 * C        both norm outputs          2 * C
        q, k, v                        3 * C        swiglu output              F
        attention output               C
        gate, up                       2 * F

    bf16, C = 1024, F = 2688: 32,512 bytes a layer and token become 23,040; block keeps 2,048.

low_rank: like selective, but of LoRPt layers only the rank-sized latents: what is computed from them (q, k, v, gate, up, and what follows
    without a product of its own) is computed again. With rank R in every layer, per token: 2 * C + C for attention's output + 7 * R, the
    seven latents; at R = C / 4 that is 9,728 bytes where selective keeps 26,624. It costs the upward products again, a sixth of
    a step's products.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch.autograd.graph import saved_tensors_hooks

from lowmem.system.dry_run import autocast_kind

Mode = Literal["none", "block", "selective", "low_rank"]


class _Recipe:
    """How to make a tensor again.

    Attributes:
        inputs: of the function, packed: some may be made again themselves.
        uses: how often it will be asked for. Between the first and the last time the tensor is kept.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: list[Any], output: torch.Tensor):
        self.function, self.inputs = function, inputs
        self.output: torch.Tensor | None = output.detach()
        self.uses = 0
        self._kept: torch.Tensor | None = None
        device_type = autocast_kind(output)
        self.device_type = device_type
        self.autocast = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def run(self) -> torch.Tensor:
        output = self._kept
        if output is None:
            enabled, dtype = self.autocast
            inputs = [_unpack(x) for x in self.inputs]
            with torch.no_grad(), torch.autocast(self.device_type, dtype=dtype, enabled=enabled):
                output = self.function(*inputs)
        self.uses -= 1
        self._kept = output if self.uses > 0 else None
        return output


class _Packed(NamedTuple):
    """A view of a tensor that is made again."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, _Packed):
        return packed
    return packed.recipe.run().as_strided(packed.size, packed.stride, packed.offset)


class _Scope:
    """The recipes of one block; outputs are held until the block ends, so that no storage address is used twice."""

    def __init__(self, low_rank: bool) -> None:
        self.low_rank = low_rank
        self.recipes: dict[int, _Recipe] = {}

    def add(self, function: Callable[..., torch.Tensor], inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        packed = [self.pack(x.detach()) if isinstance(x, torch.Tensor) else x for x in inputs]
        self.recipes[output.untyped_storage()._cdata] = _Recipe(function, packed, output)

    def knows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.recipes

    def pack(self, tensor: torch.Tensor) -> Any:
        recipe = self.recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or tensor.dtype != recipe.output.dtype:  # type: ignore[union-attr]
            return tensor
        recipe.uses += 1
        return _Packed(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def forget_outputs(self) -> None:
        for recipe in self.recipes.values():
            recipe.output = None


class _Enough(Exception):
    """All that backward asks for is computed."""


class _Again:
    """A block of which only the input is kept: its forward runs again when backward first asks for what was not.

    What `torch.utils.checkpoint` without reentrance does, which imports PyTorch's compiler at its first call (140 MB). Parameters get their
    gradients whether or not the input needs one, and hooks of modules run in both passes.

    Args:
        block: computes the same again from the same input, random state and autocast.
        hidden: its input.
    """

    def __init__(self, block: Callable[..., torch.Tensor], hidden: torch.Tensor):
        self.block, self.hidden = block, hidden.detach().requires_grad_(hidden.requires_grad)
        kinds = sorted({"cpu", autocast_kind(hidden)})
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        self.cached = torch.is_autocast_cache_enabled()
        self.random = _random_state(hidden)
        self.slots: list[ReferenceType[_Slot]] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(self._reserve, self._take):
            return self.block(hidden)

    def _reserve(self, _: torch.Tensor) -> "_Slot":
        slot = _Slot(self)
        self.slots.append(ref(slot))
        return slot

    def _take(self, slot: "_Slot") -> torch.Tensor:
        if slot.tensor is None:  # the first time, or once more after retain_graph
            self._run()
        tensor, slot.tensor = slot.tensor, None
        assert tensor is not None
        return tensor

    def _run(self) -> None:
        """Fill the slots that some node of the graph still has."""
        made = 0

        def fill(tensor: torch.Tensor) -> None:
            nonlocal made
            slot = self.slots[made]() if made < len(self.slots) else None
            if slot is not None:
                slot.tensor = tensor.detach()
            made += 1
            if made == len(self.slots):
                raise _Enough

        with _random_state_of(self.hidden, self.random), torch.enable_grad(), ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cached))
            stack.enter_context(saved_tensors_hooks(fill, _not_kept))
            try:
                self.block(self.hidden)
            except _Enough:
                return
        raise RuntimeError(f"a block kept {len(self.slots)} tensors for backward in its first run and {made} in its second")


class _Slot:
    """The place of a tensor that backward will ask for; it goes when the node that asks goes."""

    __slots__ = ("__weakref__", "again", "tensor")

    def __init__(self, again: _Again):
        self.again = again
        self.tensor: torch.Tensor | None = None


def _not_kept(_: None) -> torch.Tensor:
    raise RuntimeError("a block that is computed again is differentiated in its first run")


def _random_state(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


@contextmanager
def _random_state_of(x: torch.Tensor, state: list[torch.Tensor]) -> Iterator[None]:
    """Random numbers as they were, of the CPU and of the device of `x`; afterwards they go on as if nothing had been."""
    present = _random_state(x)
    _set_random_state(x, state)
    try:
        yield
    finally:
        _set_random_state(x, present)


def _set_random_state(x: torch.Tensor, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if x.is_cuda:
        torch.cuda.set_rng_state(state[1], x.device)


_active: ContextVar[_Scope | None] = ContextVar("lowmem_recompute_scope", default=None)


def cheap(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """`function(*inputs)`, marked as cheaper to compute again than to keep.

    Args:
        function: deterministic, and returning a new contiguous tensor.
        inputs: tensors that backward keeps for another reason, and plain values.
    """
    output = function(*inputs)
    scope = _active.get()
    if scope is not None and torch.is_grad_enabled():
        scope.add(function, inputs, output)
    return output


def remember(output: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: Any) -> None:
    """In mode low_rank: `output` is `function(*inputs)`, computed from latents, and need not be kept.

    To be called from the forward of an autograd function, with a new contiguous output; see `cheap`.
    """
    scope = _active.get()
    if scope is not None and scope.low_rank:
        scope.add(function, inputs, output)


def follow(function: Callable[..., torch.Tensor], x: torch.Tensor, *more: Any) -> torch.Tensor:
    """`function(x, *more)`, to be computed again where x is: keeping it would keep what mode low_rank is to save; see `cheap`."""
    output = function(x, *more)
    scope = _active.get()
    if scope is not None and scope.low_rank and scope.knows(x) and not scope.knows(output):
        scope.add(function, (x, *more), output)
    return output


def run_block(block: Callable[..., torch.Tensor], hidden: torch.Tensor, mode: Mode) -> torch.Tensor:
    """`block(hidden)`; gradients equal those of mode none bit for bit, random numbers included.

    Memory: see the table above.
    Source: Chen et al. 2016, arXiv:1604.06174 (block); Korthikanti et al. 2022, arXiv:2205.05198 (selective); Liu et al. 2025,
        arXiv:2502.10940 (low_rank: CoLA-M).
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(hidden)
    if mode == "block":
        return _Again(block, hidden).forward(hidden)
    scope = _Scope(low_rank=mode == "low_rank")
    token = _active.set(scope)
    try:
        with saved_tensors_hooks(scope.pack, _unpack):
            return block(hidden)
    finally:
        _active.reset(token)
        scope.forget_outputs()
