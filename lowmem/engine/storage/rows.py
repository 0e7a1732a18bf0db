"""Matrices with a row for each word that live elsewhere, and their gradients: a block of rows at a time is on the device.

Shapes: V rows, C columns, R rows of a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowmem.engine.storage.backing import Backing, NoBacking
from lowmem.engine.storage.sections import Section, Sections
from lowmem.nn.loss import row_blocks
from lowmem.nn.quantized import BLOCK, CODES, SCALE, QuantizedWeight
from lowmem.nn.rows import GradientRows, MatrixRows, Window
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.dry_run import device_kind
from lowmem.system.tensors import LazyTensor, Slice


class StreamedRows(MatrixRows):
    """Rows of a matrix in a backing, in the blocks of `row_blocks`, each beside its states.

    Args:
        parameter: with its elements, which are kept; whoever calls takes them away.
        optimizer: has, or allocates, its states.
    Memory: two blocks of rows, for an update two of their states, and the rows that are looked up.
    """

    streamed = True

    def __init__(self, parameter: nn.Parameter, optimizer: LowBitOptimizer, backing: Backing, device: torch.device):
        super().__init__(parameter)
        self.backing, self.device = backing, device
        self.weights, self.states = Sections(backing, device, "weights"), Sections(backing, device, "optimizer_states")
        self.blocks = row_blocks(self.shape[0])
        self._numbers = {rows.start: index for index, rows in enumerate(self.blocks)}
        self._updates = False
        width = self.shape[1]
        optimizer._allocate(parameter)
        for index, rows in enumerate(self.blocks):
            window = optimizer.window(parameter, rows.start * width, (rows.stop - rows.start) * width)
            self._keep(self.weights, index, _weights(window, (rows.stop - rows.start, width)))
            states = {f".{name}": state for name, state in window.states.items()}
            whole = {name: optimizer.state[parameter][name[1:]] for name in states}
            self._keep(self.states, index, {name: state.view(-1, *whole[name].shape[1:]) for name, state in states.items()})

    @staticmethod
    def takes(parameter: torch.Tensor) -> bool:
        """Whether blocks of its rows can be apart from each other: a row of codes has scales of its own."""
        return not isinstance(parameter, QuantizedWeight) or not parameter.shape[1] % BLOCK

    def _keep(self, sections: Sections, index: int, tensors: dict[str, torch.Tensor]) -> None:
        section = Section()
        for suffix, tensor in tensors.items():
            section.add((0, suffix), tensor)
        sections.keep(index, section, {(0, suffix): tensor for suffix, tensor in tensors.items()})

    def read(self, rows: slice) -> torch.Tensor:
        index = self._index(rows)
        self._updates = self._updates and index > 0  # one that did not come to its end is over
        held = {suffix: tensor for (_, suffix), tensor in self.weights.fetch(index).items()}
        self._start_next(index, states=False)
        if self._updates:
            self.states.start(index)
        if "" in held:
            return held[""][: rows.stop - rows.start]
        return QuantizedWeight(held[CODES], held[SCALE], torch.Size((rows.stop - rows.start, self.shape[1])), self.dtype)

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(self.backing, NoBacking):
            different = self._table(min(len(ids), self.shape[0])) if device_kind(ids) == "cpu" else {}  # a GPU's are on the host
            found = torch.empty(len(ids), self.shape[1], dtype=self.dtype, device=ids.device)
            del different  # not before: both are there at once
            return found
        self.weights.check(wait=True)
        self.backing.wait()
        unique, inverse = ids.to("cpu").unique(return_inverse=True)
        table = self._table(len(unique))
        for position, row in enumerate(unique.tolist()):
            self._get(row, {suffix: part[position] for suffix, part in table.items()})
        if "" in table:
            found = table[""]
        else:
            shape = torch.Size((len(unique), self.shape[1]))
            found = QuantizedWeight(table[CODES].view(-1), table[SCALE].view(-1), shape, self.dtype).dense(self.dtype)
        return found[inverse].to(self.device)

    def _table(self, count: int) -> dict[str, torch.Tensor]:
        """Room for some rows on the host."""
        rows = self.blocks[0].stop
        pieces = self.weights.parts[0].pieces.items()
        return {suffix: torch.empty(count, piece.shape.numel() // rows, dtype=piece.dtype) for (_, suffix), piece in pieces}

    def _get(self, row: int, parts: dict[str, torch.Tensor]) -> None:
        index = row // self.blocks[0].stop
        for suffix, part in parts.items():
            start, _ = self.weights.parts[index].place((0, suffix))
            self.backing.get(start + (row - self.blocks[index].start) * part.numel() * part.element_size(), part, scattered=True)

    @contextmanager
    def updating(self, rows: slice) -> Iterator[Window]:
        index = self._index(rows)
        weights = {suffix: tensor for (_, suffix), tensor in self.weights.fetch(index).items()}
        states = {suffix[1:]: tensor for (_, suffix), tensor in self.states.fetch(index).items()}
        self._updates = rows.stop < self.shape[0]
        self._start_next(index, states=True)
        count = (rows.stop - rows.start) * self.shape[1]
        flat = {name: state.view(-1) for name, state in states.items()}
        yield Window(weights[""].view(-1)[:count] if "" in weights else weights[CODES], weights.get(SCALE), flat)
        self.weights.write(index)
        self.states.write(index)

    def _start_next(self, index: int, *, states: bool) -> None:
        if index + 1 < len(self.blocks):
            self.weights.start(index + 1)
            if states:
                self.states.start(index + 1)

    def _index(self, rows: slice) -> int:
        index = self._numbers.get(rows.start, -1)
        if index < 0 or rows.stop != self.blocks[index].stop:
            raise ValueError(f"rows {rows.start} to {rows.stop} are no block of rows")
        return index

    def lazy(self, suffix: str, whole: torch.Tensor) -> LazyTensor:
        """For a checkpoint: the weights, or codes or scales of them.

        Args:
            whole: of the shape and dtype of all rows together.
        """
        return self._lazy(self.weights, suffix, tuple(whole.shape), whole.dtype)

    def lazy_states(self) -> dict[str, LazyTensor]:
        """For a checkpoint: the states, by a dot and their name."""
        found = {}
        for (_, suffix), piece in self.states.parts[0].pieces.items():
            length = sum(section.pieces[0, suffix].shape[0] for section in self.states.parts.values())
            found[suffix] = self._lazy(self.states, suffix, (length, *piece.shape[1:]), piece.dtype)
        return found

    def _lazy(self, sections: Sections, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        def get() -> torch.Tensor:
            parts = []
            for _, section in sorted(sections.parts.items()):
                piece = section.pieces[0, suffix]
                parts.append(torch.empty(piece.shape, dtype=piece.dtype))
                self.backing.get(section.place((0, suffix))[0], parts[-1])
            return torch.cat(parts)

        def copy_to(file: int) -> None:
            for _, section in sorted(sections.parts.items()):
                self.backing.copy_to(file, *section.place((0, suffix)))

        return LazyTensor(shape, dtype, get, copy_to)

    def each(self, name: str, *, changed: bool) -> Iterator[dict[str, Slice]]:
        """The rows in blocks, as a file has them under `name`.

        Args:
            changed: they are filled by whoever asked for them.
        """
        yield from self._each(self.weights, name, changed)

    def each_states(self, name: str) -> Iterator[dict[str, torch.Tensor | Slice]]:
        """The states in blocks, to be filled, as a file has them under `name`."""
        for part in self._each(self.states, name, True):
            yield dict(part)

    def _each(self, sections: Sections, name: str, changed: bool) -> Iterator[dict[str, Slice]]:
        firsts = dict.fromkeys((suffix for _, suffix in sections.parts[0].pieces), 0)
        for index in sorted(sections.parts):
            held = sections.blank(index) if changed else sections.fetch(index)
            yield {name + suffix: Slice(tensor, firsts[suffix]) for (_, suffix), tensor in held.items()}
            for (_, suffix), tensor in held.items():
                firsts[suffix] += len(tensor)
            if changed:
                sections.write(index)


def _weights(window: Window, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    if window.weight_scale is None:
        return {"": window.weights.view(shape)}
    return {CODES: window.weights, SCALE: window.weight_scale}


class StreamedGradient(GradientRows):
    """The gradient of a matrix in the same backing.

    Memory: two blocks of rows in `dtype`.
    """

    def __init__(self, matrix: StreamedRows, dtype: torch.dtype, backing: Backing, device: torch.device):
        self.matrix, self.sections = matrix, Sections(backing, device, "gradients")
        for index, rows in enumerate(matrix.blocks):
            section = Section()
            section.add((0, ""), torch.empty(rows.stop - rows.start, matrix.shape[1], dtype=dtype, device="meta"))
            self.sections.keep(index, section, {(0, ""): torch.empty(0, device="meta")})

    def write(self, rows: slice, gradient: torch.Tensor) -> None:
        index = self.matrix._index(rows)
        self.sections.blank(index)[0, ""][: len(gradient)].copy_(gradient)
        self.sections.write(index)

    def read(self, rows: slice) -> torch.Tensor:
        index = self.matrix._index(rows)
        found = self.sections.fetch(index)[0, ""]
        if index + 1 < len(self.matrix.blocks):
            self.sections.start(index + 1)
        return found[: rows.stop - rows.start]
