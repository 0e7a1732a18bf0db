"""What AdamW and Lion share: states of 32, 8 or 4 bits, weights of 32, 16, 8 or 4, and updates of parts of a tensor."""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from lowmem.nn.quantized import QuantizedWeight
from lowmem.nn.rows import Window
from lowmem.optim.kernels.formats import BLOCK, FORMATS, StateBits, StepScalars, mix_key, scale_count, state_bits_of
from lowmem.optim.kernels.operator import optimizer_step_
from lowmem.optim.kernels.reference import decode_signed, decode_unsigned, encode_signed, encode_unsigned, random_bits, second_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STAGED_NUMBERS = 1 << 16
# torch wraps these so that their first call imports its compiler, which costs 150 MB of memory
_ADD_PARAM_GROUP, _ZERO_GRAD, _LOAD_STATE_DICT = (
    inspect.unwrap(method)
    for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad, torch.optim.Optimizer.load_state_dict)
)


class LowBitOptimizer(torch.optim.Optimizer):
    """An ordinary optimizer whose states are codes and scales; see `lowmem.optim.kernels.formats`.

    bf16, fp16 and quantised weights are rounded stochastically and have no master copy. Random numbers depend on the seed, the step, the
    position of the parameter and of the element alone, so a resumed run draws the same ones, and so do updates in parts.

    A group with "flattened" has one-dimensional pieces of matrices, as ZeRO makes them, whose states have `state_bits` all the same.
    """

    state_names: tuple[str, ...]
    widths: tuple[int, ...] = (32, 8, 4)  # that the states may have

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], seed: int):
        self.seed = seed
        super().__init__(params, defaults)
        self._index_parameters()

    @abstractmethod
    def scalars(self, group: dict[str, Any], step: int, **random: Any) -> StepScalars:
        """The numbers of update number `step`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters.

        Raises:
            ValueError: a setting is out of its range, or a parameter has a dtype that has no kernel.
        """
        _ADD_PARAM_GROUP(self, param_group)
        group = self.param_groups[-1]
        _check_group(group, self.widths)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or make them zero."""
        _ZERO_GRAD(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Memory: nothing that grows with a tensor; the states are allocated by the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._index_parameters()  # DeepSpeed replaces parameters between steps
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.begin(parameter)
                    self.update(parameter, parameter.grad)
        return loss

    def begin(self, parameter: torch.Tensor) -> None:
        """Count one update of `parameter`, whose parts `update` then applies in any order."""
        self._allocate(parameter)
        self.state[parameter]["step"] += 1

    @torch.no_grad()
    def update(self, parameter: torch.Tensor, grad: torch.Tensor, *, start: int = 0, grad_scale: float = 1.0) -> None:
        """Apply the step begun to the numbers start, start + 1, ... of `parameter`.

        Args:
            grad: their gradient, fp32 or 16 bits, whatever the dtype of the weight; all of the parameter if of its shape.
            start: a multiple of 128.
            grad_scale: multiplies the gradient as it is read.
        Raises:
            ValueError: a sparse gradient, a start or end inside a block, or states of another width than the group's `state_bits`.
        Memory: none; 512 KiB where `parameter` or `grad` are not contiguous.
        """
        if grad.is_sparse:
            raise ValueError("the gradient is sparse, lowmem's optimizers update dense ones; use nn.Embedding(sparse=False)")
        count = grad.numel()
        quantized = isinstance(parameter, QuantizedWeight)
        if grad.is_contiguous() and (quantized or parameter.is_contiguous()):
            self.apply(parameter, self.window(parameter, start, count), grad.view(-1), start=start, grad_scale=grad_scale)
            return
        self._check_range(parameter, start, count)
        self._check_state(parameter)
        for first in range(0, count, _STAGED_NUMBERS):
            last = min(first + _STAGED_NUMBERS, count)
            here, gradients = start + first, grad.new_empty(last - first)
            _copy_range(grad, first, gradients)
            if quantized:
                window = self.window(parameter, here, last - first)
            else:
                window = Window(parameter.new_empty(last - first), None, self._states(parameter, here, last - first))
                _copy_range(parameter.detach(), here, window.weights)
            self.apply(parameter, window, gradients, start=here, grad_scale=grad_scale)
            if not quantized:
                _copy_range(parameter.detach(), here, window.weights, back=True)

    def window(self, parameter: torch.Tensor, start: int, count: int) -> Window:
        """Weights and states of the numbers start, start + 1, ... of a contiguous or quantised parameter, sharing memory.

        Args:
            start: a multiple of 128.
        Raises:
            ValueError: a start or end inside a block, or states of another width than the group's `state_bits`.
        """
        self._check_range(parameter, start, count)
        self._check_state(parameter)
        states = self._states(parameter, start, count)
        if isinstance(parameter, QuantizedWeight):
            return Window(*parameter.blocks(start, count), states)
        return Window(parameter.detach().view(-1)[start : start + count], None, states)

    @torch.no_grad()
    def apply(self, parameter: torch.Tensor, window: Window, grad: torch.Tensor, *, start: int = 0, grad_scale: float = 1.0) -> None:
        """Apply the step begun to what `window` holds, wherever that lies.

        Args:
            parameter: says which group, step and random numbers these are; nothing of its own numbers is looked at.
            window: of the numbers start, start + 1, ...
            grad: their gradient, flat and contiguous, of any of the dtypes of `update`.
            grad_scale: multiplies the gradient as it is read.
        Raises:
            ValueError: states of another size than `grad` needs.
        Memory: none.
        """
        if not grad.numel():
            return
        group, step, bits = self._groups[parameter], self.state[parameter]["step"], self.bits_of(parameter)
        self._check_window(parameter, window, grad.numel())
        key = mix_key(self.seed, step, self._positions[parameter])
        scalars = self.scalars(group, step, grad_scale=grad_scale, key=key, offset=start)
        held = window.states.get
        scales = held("exp_avg_scale"), held("exp_avg_sq_scale")
        optimizer_step_(window.weights, grad, window.states["exp_avg"], held("exp_avg_sq"), *scales, scalars, bits, window.weight_scale)
        _written(parameter)

    def _states(self, parameter: torch.Tensor, start: int, count: int) -> dict[str, torch.Tensor]:
        """Parts of the states, by name, flat."""
        state, bits = self.state[parameter], self.bits_of(parameter)
        blocks = slice(start // BLOCK, scale_count(start + count))
        codes = slice(start, start + count) if bits == 32 else slice(blocks.start * BLOCK * bits // 8, blocks.stop * BLOCK * bits // 8)
        parts = {name: state[name].view(-1)[codes] for name in self.names_of(parameter)}
        if bits != 32:
            parts |= {f"{name}_scale": state[f"{name}_scale"][blocks] for name in self.names_of(parameter)}
        return parts

    def _check_range(self, parameter: torch.Tensor, start: int, count: int) -> None:
        if start % BLOCK:
            raise ValueError(f"start is {start}, must be a multiple of {BLOCK}")
        if (start + count) % BLOCK and start + count != parameter.numel():
            raise ValueError(f"the update ends at {start + count}, must end at a multiple of {BLOCK} or at the end ({parameter.numel()})")

    def _check_state(self, parameter: torch.Tensor) -> None:
        """See that states have the width that their group asks for, which may have been changed since the first step."""
        state, bits = self.state[parameter], self.bits_of(parameter)
        for name in self.names_of(parameter):
            self._check_codes(name, state[name], bits, parameter.numel())

    def _check_window(self, parameter: torch.Tensor, window: Window, count: int) -> None:
        """Kernels trust the sizes of what they are given."""
        bits = self.bits_of(parameter)
        for name in self.names_of(parameter):
            self._check_codes(name, window.states[name], bits, count)
        if window.weight_scale is None and window.weights.numel() != count:
            raise ValueError(f"the window has {window.weights.numel()} weights, the gradient {count}; both are of the same numbers")

    @staticmethod
    def _check_codes(name: str, codes: torch.Tensor, bits: int, count: int) -> None:
        wanted = count if bits == 32 else FORMATS[bits].code_bytes(count)
        if (codes.dtype, codes.numel()) != (_code_dtype(name, bits), wanted):
            raise ValueError(
                f"{name} has {codes.numel()} numbers of {codes.dtype}, state_bits={bits} needs {wanted} of "
                f"{_code_dtype(name, bits)}; the width of a parameter's states cannot change once they exist"
            )

    def names_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Names of the moments that `parameter` has."""
        return self.state_names

    def bits_of(self, parameter: torch.Tensor) -> StateBits:
        """Bits of the states of `parameter`; see `state_bits_of`."""
        group = self._groups[parameter]
        return state_bits_of(parameter.shape, group["state_bits"], flattened=group.get("flattened", False))

    def allocate_states(self) -> None:
        """Allocate the states of every parameter now, in one piece of memory, rather than among the temporaries of the first step."""
        for parameter in self._groups:
            self._allocate(parameter)

    def fresh_states(self, parameter: torch.Tensor) -> dict[str, Any]:
        """What the states of a parameter are before its first step; those that it has stay.

        Memory: one parameter's states.
        """
        kept = self.state.pop(parameter, None)
        self._allocate(parameter)
        fresh: dict[str, Any] = self.state.pop(parameter)
        if kept is not None:
            self.state[parameter] = kept
        return fresh

    def _allocate(self, parameter: torch.Tensor) -> None:
        state, bits = self.state[parameter], self.bits_of(parameter)
        if state:
            return
        state["step"] = 0
        for name in self.names_of(parameter):
            if bits == 32:
                state[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
                continue
            size = FORMATS[bits].code_bytes(parameter.numel())
            state[name] = torch.zeros(size, dtype=_code_dtype(name, bits), device=parameter.device)
            state[f"{name}_scale"] = torch.zeros(scale_count(parameter.numel()), dtype=torch.float32, device=parameter.device)

    def _index_parameters(self) -> None:
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self._groups = dict(pairs)
        self._positions = {parameter: position for position, (parameter, _) in enumerate(pairs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, bit for bit, on the devices of the parameters.

        torch's own method casts floating states to the dtype of the parameter, which would round the scales of bf16 weights.
        """
        flattened = [group.get("flattened", False) for group in self.param_groups]
        _LOAD_STATE_DICT(self, {"state": {}, "param_groups": state_dict["param_groups"]})
        for group, flag in zip(self.param_groups, flattened, strict=True):
            group["flattened"] = flag  # what these parameters are, not those of `state_dict`
        self._index_parameters()
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._positions, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._index_parameters()

    def describe(self) -> str:
        """How many numbers have states of how many bits."""
        counts: dict[int, tuple[int, int]] = {}
        for parameter in self._groups:
            tensors, numbers = counts.get(self.bits_of(parameter), (0, 0))
            counts[self.bits_of(parameter)] = (tensors + 1, numbers + parameter.numel())
        parts = [f"{bits}-bit for {tensors} tensors of {numbers:,} numbers" for bits, (tensors, numbers) in sorted(counts.items())]
        return f"{type(self).__name__} states {', '.join(parts)}"

    def __repr__(self) -> str:
        """Settings of each group, and how many numbers have states of how many bits."""
        return super().__repr__().rstrip(")") + f"    {self.describe()}\n)"


def _code_dtype(name: str, bits: int) -> torch.dtype:
    if bits == 32:
        return torch.float32
    return torch.int8 if bits == 8 and name == "exp_avg" else torch.uint8


def _written(parameter: torch.Tensor) -> None:
    """Tell autograd what kernels that are given a pointer cannot: a graph that saved this weight must not be differentiated any more."""
    parts = [parameter.codes, parameter.scale] if isinstance(parameter, QuantizedWeight) else []
    torch.autograd.graph.increment_version([parameter, *parts])


def _check_group(group: dict[str, Any], widths: tuple[int, ...]) -> None:
    problems = []
    if group["state_bits"] not in widths:
        problems.append(f"state_bits is {group['state_bits']}; allowed: {', '.join(map(str, widths))}")
    problems += [
        f"{name} is {group[name]}, must be finite and 0 or more"
        for name in ("lr", "eps", "weight_decay")
        if not 0 <= group.get(name, 0) < math.inf
    ]
    problems += [f"betas has {beta}, must be in [0, 1)" for beta in group["betas"] if not 0 <= beta < 1]
    problems += [f"a parameter is {p.dtype}; allowed: fp32, bf16, fp16" for p in group["params"] if p.dtype not in DTYPES]
    if problems:
        raise ValueError("; ".join(problems))


def _copy_range(tensor: torch.Tensor, start: int, flat: torch.Tensor, back: bool = False) -> None:
    """Copy numbers start, start + 1, ... of `tensor`, in the order of its indices, to `flat`, or back from there."""
    if tensor.dim() <= 1:
        part = tensor.reshape(-1)[start : start + flat.numel()] if tensor.dim() == 0 else tensor[start : start + flat.numel()]
        part.copy_(flat) if back else flat.copy_(part)
        return
    row = tensor[0].numel()
    done = 0
    while done < flat.numel():
        index, inside = divmod(start + done, row)
        whole_rows = (flat.numel() - done) // row if inside == 0 else 0
        count = whole_rows * row or min(row - inside, flat.numel() - done)
        piece = flat[done : done + count]
        if whole_rows:
            rows = tensor[index : index + whole_rows]
            rows.copy_(piece.view(rows.shape)) if back else piece.view(rows.shape).copy_(rows)
        else:
            _copy_range(tensor[index], inside, piece, back)
        done += count


Shape = tuple[int, ...]


@torch.no_grad()
def resize_states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, old: Shape, *, grown: bool) -> None:
    """Have the states of `parameter`, whose shape was `old`, follow it, quantised ones too.

    Args:
        grown: the old numbers are the first rows and columns of the new: they keep their states. exp_avg of the new ones is zero,
            exp_avg_sq the mean of the old, so that their first steps have a usual size. Otherwise the numbers mean something else
            now: states start anew, with the count of steps that corrects their bias.
    Memory: the states of one parameter in fp32.
    """
    state = optimizer.state[parameter]
    wide = _decoded(state, old) if grown else {}
    step = state.get("step")
    before = dict(state)
    state.clear()
    if isinstance(optimizer, LowBitOptimizer):
        optimizer.begin(parameter)
        state["step"] = step if grown else 0
    else:
        for name, value in before.items():
            state[name] = value if name == "step" else value.new_zeros(parameter.shape)
        if not grown and step is not None:
            step.zero_()
    for name, value in wide.items():
        fill = value.mean() if name == "exp_avg_sq" else value.new_zeros(())
        new = fill.expand(parameter.shape).clone(memory_format=torch.contiguous_format)
        new[tuple(slice(size) for size in old)] = value
        _encode(optimizer, parameter, state, name, new)


@torch.no_grad()
def fit_states(optimizer: LowBitOptimizer) -> None:
    """Give loaded states the width that `optimizer` keeps them in; those that have it stay, bit for bit.

    Earlier versions kept narrow states of norms and biases of 4,096 elements or more, and 4 bits whatever the width of rows.

    Memory: the states of one parameter in fp32.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state, numel = optimizer.state[parameter], parameter.numel()
            held = {_width(state, name, numel) for name in optimizer.names_of(parameter) if name in state}
            if held <= {optimizer.bits_of(parameter)} or not held <= {32, 8, 4}:
                continue
            wide, step = _decoded(state, tuple(parameter.shape)), state["step"]
            for name in (*wide, *(f"{name}_scale" for name in wide), "step"):
                state.pop(name, None)
            kept = dict(state)
            state.clear()
            optimizer.begin(parameter)
            state.update(kept, step=step)
            for name, value in wide.items():
                _encode(optimizer, parameter, state, name, value)


def _width(state: dict[str, Any], name: str, numel: int) -> int:
    """Bits of a stored state; 0 where it is none of this many elements."""
    value = state[name]
    if f"{name}_scale" not in state:
        return 32 if value.numel() == numel else 0
    return next((bits for bits, fmt in FORMATS.items() if value.numel() == fmt.code_bytes(numel)), 0)


def _decoded(state: dict[str, Any], old: Shape) -> dict[str, torch.Tensor]:
    """exp_avg and exp_avg_sq in fp32, of shape `old`."""
    decoders: dict[str, Callable[..., torch.Tensor]] = {"exp_avg": decode_signed, "exp_avg_sq": decode_unsigned}
    numel, found = torch.Size(old).numel(), {}
    for name, decode in decoders.items():
        if name not in state:
            continue
        value = state[name]
        if f"{name}_scale" in state:
            bits = 8 * value.numel() // (scale_count(numel) * BLOCK)
            value = decode(value.view(-1, BLOCK * bits // 8), state[f"{name}_scale"], FORMATS[bits]).flatten()[:numel]
        found[name] = value.view(old)
    return found


def _encode(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    if f"{name}_scale" not in state:
        state[name].copy_(value)
        return
    assert isinstance(optimizer, LowBitOptimizer)
    bits = optimizer.bits_of(parameter)
    fmt, blocks = FORMATS[bits], scale_count(parameter.numel())
    rows = F.pad(value.flatten(), (0, blocks * BLOCK - value.numel())).view(-1, BLOCK)
    key = mix_key(optimizer.seed, state["step"], parameter.shape[0])
    noise = random_bits(key, 0, rows.numel(), rows.device).view(-1, BLOCK)
    codes, scale = encode_signed(rows, second_bits(noise), fmt) if name == "exp_avg" else encode_unsigned(rows, noise, fmt)
    state[name].view(-1, BLOCK * bits // 8).copy_(codes)
    state[f"{name}_scale"].copy_(scale)
