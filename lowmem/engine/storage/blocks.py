"""Where the weights and optimizer states of blocks live (D12): on the device, or elsewhere and on the device one block at a time.

A block that is elsewhere has parameters of its shapes and dtypes whose elements are all NaN and take no memory. `fetch` gives it its
weights, for an update its states, too, while the next block is on its way; `release` and `write_back` take them away again. Two blocks
are on the device at most: the one that is computed with, and the one before or after it, which is read or written meanwhile.

Source: the order of execution of L2L, Pudipeddi et al. 2020, arXiv:2002.05645; states on disk, Rajbhandari et al. 2021, arXiv:2104.07857.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem.engine.storage.backing import Backing
from lowmem.engine.storage.disk_file import aligned_size
from lowmem.engine.storage.rows import StreamedGradient, StreamedRows
from lowmem.engine.storage.sections import Key, Section, Sections
from lowmem.nn.quantized import CodedWeight, stored_tensors
from lowmem.nn.rows import GradientRows, MatrixRows, ResidentGradient, ResidentRows
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.dry_run import note
from lowmem.system.tensors import LazyTensor, Slice


class Storage:
    """Blocks that stay on the device: nothing happens.

    Attributes:
        streams: whether blocks are elsewhere.
    """

    streams = False

    def place(self, block: nn.Module, index: int) -> nn.Module:
        """Take over block number `index`, which has its weights; the block itself, without its elements where they are elsewhere."""
        return block

    def adopt(self, blocks: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        """Take over the optimizer states of blocks, before any exist."""

    def adopt_matrix(self, parameter: nn.Parameter, optimizer: LowBitOptimizer, gradient: torch.dtype | None = None) -> None:
        """Take over a (V, C) matrix that will only be read and updated in blocks of rows, and its states.

        Args:
            gradient: of what is kept of its gradient until the end of the step, for which there is room from now on; None keeps none.
        """

    def has_matrix(self, parameter: torch.Tensor) -> bool:
        """Whether a matrix was taken over and is elsewhere."""
        return False

    def has(self, parameter: torch.Tensor) -> bool:
        """Whether the elements of a parameter are elsewhere."""
        return False

    def matrix(self, parameter: torch.Tensor) -> MatrixRows | None:
        """The rows of a matrix that is elsewhere, to be read; None where it is here, or in a block."""
        return None

    @contextmanager
    def holding(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """The block that has these parameters is on the device, to be read; those of no block are left as they are."""
        yield

    def rows_of(self, parameter: nn.Parameter, optimizer: LowBitOptimizer) -> MatrixRows:
        """The rows of a matrix, from where they are."""
        return ResidentRows(parameter, optimizer.window)

    def gradient_rows_of(self, matrix: MatrixRows, dtype: torch.dtype, device: torch.device) -> GradientRows:
        """Where the gradient of a matrix is kept until the end of the step.

        Memory: the gradient in `dtype`, where the matrix is on the device.
        """
        gradient = torch.empty(matrix.shape, dtype=dtype, device=device)
        note(gradient, "gradients")
        return ResidentGradient(gradient)

    @contextmanager
    def block(self, index: int, *, states: bool = False, ahead: int | None = None, blank: bool = False) -> Iterator["Visit"]:
        """Block `index` on the device.

        Args:
            states: with the optimizer states of what is trained in it.
            ahead: the block that comes next, which is fetched meanwhile in the same form.
            blank: all that it has will be filled by whoever asked for it, and is not fetched.
        Yields:
            What says whether the block was changed.
        """
        yield Visit()

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | LazyTensor]:
        """For a checkpoint: `tensors` as they are stored, with those that are elsewhere to be read from there one by one."""
        return dict(stored_tensors(tensors))

    def saved_states(self, names: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
        """For a checkpoint: by "parameter.state" name the states that are elsewhere.

        Args:
            names: parameters by name.
        """
        return {}

    def each_part(self, tensors: Mapping[str, torch.Tensor], *, changed: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """`tensors` in parts, each while its elements are on the device.

        Args:
            tensors: parameters of the model, by name.
            changed: each part is filled by whoever asked for it.
        """
        yield dict(tensors)

    def each_rows(self, tensors: Mapping[str, torch.Tensor], *, changed: bool = False) -> Iterator[dict[str, Slice]]:
        """As `each_part`, of the matrices that are elsewhere, as they are stored."""
        yield from ()

    def each_state(self, names: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor | Slice]]:
        """The optimizer states that are elsewhere, in parts, each to be filled; see `saved_states`."""
        yield from ()

    def component_bytes(self) -> dict[str, int]:
        """Bytes that blocks take elsewhere, and that buffers for them take here."""
        return {}

    def flush(self) -> None:
        """Return once all that was changed is kept."""

    def close(self) -> None:
        """Give back what is held elsewhere."""


@dataclass
class Visit:
    """A stay of a block on the device.

    Attributes:
        changed: its weights and states are to be written back.
    """

    changed: bool = False


class StreamedBlocks(Storage):
    """Blocks, and matrices with a row for each word, that live in a backing.

    Frozen weights are read only; a block's other weights and its states are written after its update. Calls of a block's module outside
    of `block` bring it here for as long as they last.

    Args:
        backing: on a disk, in host memory, or nowhere in a dry run.
        device: that computes.
    Memory: on the device, twice the largest block's weights, and twice its states once there are any; where a disk serves a GPU, as much
        pinned host memory. Of matrices see `StreamedRows`.
    """

    streams = True

    def __init__(self, backing: Backing, device: torch.device):
        self.backing, self.device = backing, device
        self.weights, self.states = Sections(backing, device, "weights"), Sections(backing, device, "optimizer_states")
        self._matrices: dict[int, StreamedRows] = {}
        self._gradients: dict[int, StreamedGradient] = {}
        self._parameters: dict[int, torch.Tensor] = {}  # by id, those of all sections
        self._owners: dict[int, int] = {}  # by id of a parameter, its block
        self._optimizer: torch.optim.Optimizer | None = None
        self._here: set[int] = set()
        self._stays: dict[int, Any] = {}  # of blocks that are here for a call of their module

    def place(self, block: nn.Module, index: int) -> nn.Module:
        section, values = Section(), {}
        for parameter in block.parameters():
            self._parameters[id(parameter)] = parameter
            self._owners[id(parameter)] = index
            for suffix, part in _parts(parameter).items():
                values[id(parameter), suffix] = part
                section.add((id(parameter), suffix), part)
        self.weights.keep(index, section, values)
        for key in section.pieces:
            self._detach_weight(key)
        block.register_forward_pre_hook(partial(self._before_call, index))
        block.register_forward_hook(partial(self._after_call, index), always_call=True)
        return block

    def adopt(self, blocks: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        for index, block in enumerate(blocks):
            weights, section, values = self.weights.parts[index], Section(), {}
            held = {key[0] for key in weights.pieces}
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad and id(parameter) in held]
            with self.block(index):
                for parameter in trained:
                    optimizer._allocate(parameter)  # type: ignore[attr-defined]  # lowmem's own: others cannot update a part of a model
            for parameter in trained:
                for name, state in optimizer.state[parameter].items():
                    if isinstance(state, torch.Tensor):
                        values[id(parameter), f".{name}"] = state
                        section.add((id(parameter), f".{name}"), state)
            self.states.keep(index, section, values)
            for key in section.pieces:
                self._detach_state(key)
            ends = [piece.offset + piece.nbytes for key, piece in weights.pieces.items() if key[0] in {id(p) for p in trained}]
            weights.written = aligned_size(max(ends, default=0))

    def adopt_matrix(self, parameter: nn.Parameter, optimizer: LowBitOptimizer, gradient: torch.dtype | None = None) -> None:
        if id(parameter) in self._matrices or not StreamedRows.takes(parameter):
            return
        self._parameters[id(parameter)] = parameter
        self._matrices[id(parameter)] = matrix = StreamedRows(parameter, optimizer, self.backing, self.device)
        if gradient is not None:
            self._gradients[id(parameter)] = StreamedGradient(matrix, gradient, self.backing, self.device)
        for suffix in _parts(parameter):
            self._detach_weight((id(parameter), suffix))
        for name in [name for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)]:
            self._detach_state((id(parameter), f".{name}"))

    def has_matrix(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._matrices

    def has(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._parameters

    def matrix(self, parameter: torch.Tensor) -> MatrixRows | None:
        return self._matrices.get(id(parameter))

    @contextmanager
    def holding(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        blocks = {self._owners[id(tensor)] for tensor in tensors if id(tensor) in self._owners} - self._here
        with ExitStack() as stack:
            for index in sorted(blocks):  # what was fetched last is still in its buffer
                stack.enter_context(self.block(index))
            yield

    def rows_of(self, parameter: nn.Parameter, optimizer: LowBitOptimizer) -> MatrixRows:
        return self._matrices.get(id(parameter)) or super().rows_of(parameter, optimizer)

    def gradient_rows_of(self, matrix: MatrixRows, dtype: torch.dtype, device: torch.device) -> GradientRows:
        return self._gradients.get(id(matrix.parameter)) or super().gradient_rows_of(matrix, dtype, device)

    @contextmanager
    def block(self, index: int, *, states: bool = False, ahead: int | None = None, blank: bool = False) -> Iterator[Visit]:
        visit, kinds = Visit(), [self.weights, self.states][: 1 + states]
        if any((other - index) % 2 == 0 for other in self._here):
            raise ValueError(f"blocks {sorted(self._here)} are here, and block {index} needs the buffer of one of them")
        self._here.add(index)
        try:
            for sections in kinds if not blank else ():
                sections.start(index)
            if ahead in self.weights.parts and (ahead - index) % 2:  # else it has the slot of this one
                for sections in kinds:
                    sections.start(ahead)
            for sections in kinds:
                for key, tensor in (sections.blank if blank else sections.fetch)(index).items():
                    self._attach(sections, key, tensor)
            yield visit
        finally:
            self._here.discard(index)
            for sections in kinds:
                for key in sections.parts[index].pieces:
                    (self._detach_weight if sections is self.weights else self._detach_state)(key)
                if visit.changed:
                    sections.write(index)

    def _attach(self, sections: Sections, key: Key, tensor: torch.Tensor) -> None:
        parameter = self._parameters[key[0]]
        if sections is self.weights:
            _set_part(parameter, key[1], tensor)
        else:
            assert self._optimizer is not None
            self._optimizer.state[parameter][key[1][1:]] = tensor

    def _detach_weight(self, key: Key) -> None:
        """Elements that whoever uses them notices, and that take no memory."""
        parameter = self._parameters[key[0]]
        part = _parts(parameter)[key[1]]
        fill = float("nan") if part.is_floating_point() else 0
        _set_part(parameter, key[1], torch.full((), fill, dtype=part.dtype, device=self.device).expand(part.shape))

    def _detach_state(self, key: Key) -> None:
        assert self._optimizer is not None
        self._optimizer.state[self._parameters[key[0]]].pop(key[1][1:], None)

    def _before_call(self, index: int, module: nn.Module, inputs: Any) -> None:
        if index not in self._here:
            stay = self.block(index, ahead=(index + 1) % len(self.weights.parts))
            stay.__enter__()
            self._stays[index] = stay

    def _after_call(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        stay = self._stays.pop(index, None)
        if stay is not None:
            stay.__exit__(None, None, None)

    def flush(self) -> None:
        for sections in self._all_sections():
            sections.check(wait=True)
        self.backing.wait()

    def _all_sections(self) -> list[Sections]:
        rows = [sections for matrix in self._matrices.values() for sections in (matrix.weights, matrix.states)]
        return [self.weights, self.states, *rows, *(gradient.sections for gradient in self._gradients.values())]

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | LazyTensor]:
        self.flush()
        places = _places(self.weights)
        found: dict[str, torch.Tensor | LazyTensor] = {}
        for name, tensor in tensors.items():
            for suffix, part in _parts(tensor).items():
                key = id(tensor), suffix
                if key in places:
                    found[name + suffix] = self._lazy(places[key].place(key), part.shape, part.dtype)
                else:
                    found[name + suffix] = self._matrices[key[0]].lazy(suffix, part) if key[0] in self._matrices else part
        return found

    def saved_states(self, names: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
        by_id = {id(parameter): name for name, parameter in names.items()}
        found = {}
        for key, section in _places(self.states).items():
            piece = section.pieces[key]
            found[by_id[key[0]] + key[1]] = self._lazy(section.place(key), piece.shape, piece.dtype)
        for number, matrix in self._matrices.items():
            found |= {by_id[number] + suffix: lazy for suffix, lazy in matrix.lazy_states().items()}
        return found

    def _lazy(self, place: tuple[int, int], shape: torch.Size, dtype: torch.dtype) -> LazyTensor:
        offset, size = place

        def get() -> torch.Tensor:
            made = torch.empty(shape, dtype=dtype)
            self.backing.get(offset, made)
            return made

        return LazyTensor(tuple(shape), dtype, get, lambda file: self.backing.copy_to(file, offset, size))

    def each_part(self, tensors: Mapping[str, torch.Tensor], *, changed: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        owners = self._owners
        yield {name: tensor for name, tensor in tensors.items() if id(tensor) not in owners and id(tensor) not in self._matrices}
        for index, section in sorted(self.weights.parts.items()):
            part = {name: tensor for name, tensor in tensors.items() if owners.get(id(tensor)) == index}
            if part:
                whole = {id(tensor) for tensor in part.values()} == {key[0] for key in section.pieces}
                with self.block(index, ahead=None if changed else index + 1, blank=changed and whole) as visit:
                    yield part
                    visit.changed = changed

    def each_rows(self, tensors: Mapping[str, torch.Tensor], *, changed: bool = False) -> Iterator[dict[str, Slice]]:
        for name, tensor in tensors.items():
            if id(tensor) in self._matrices:
                yield from self._matrices[id(tensor)].each(name, changed=changed)

    def each_state(self, names: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor | Slice]]:
        by_id = {id(parameter): name for name, parameter in names.items()}
        for index, section in sorted(self.states.parts.items()):
            if section.pieces:
                yield {by_id[key[0]] + key[1]: tensor for key, tensor in self.states.blank(index).items()}
                self.states.write(index)
        for number, matrix in self._matrices.items():
            yield from matrix.each_states(by_id[number])

    def component_bytes(self) -> dict[str, int]:
        every = self._all_sections()
        return {
            "elsewhere": sum(section.size for sections in every for section in sections.parts.values()),
            "buffers": sum(sections.buffer_bytes() for sections in every),
        }

    def close(self) -> None:
        self.backing.close()


def _places(sections: Sections) -> dict[Key, Section]:
    return {key: section for section in sections.parts.values() for key in section.pieces}


def _parts(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What memory holds of a parameter, by what is added to its name."""
    return parameter.parts() if isinstance(parameter, CodedWeight) else {"": parameter}


def _set_part(parameter: torch.Tensor, suffix: str, value: torch.Tensor) -> None:
    if isinstance(parameter, CodedWeight):
        setattr(parameter, parameter.PARTS[suffix], value)
    else:
        parameter.data = value
