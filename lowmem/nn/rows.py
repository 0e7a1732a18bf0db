"""Matrices with a row for each word of the vocabulary, read and updated some rows at a time, wherever they live.

Shapes: V rows, C columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from lowmem.nn.quantized import CodedWeight, QuantizedWeight


@dataclass(frozen=True)
class Window:
    """A run of the numbers of one parameter, and of their optimizer states, to be updated in place.

    Attributes:
        weights: flat and contiguous; of a quantised parameter the codes of whole blocks.
        weight_scale: the scales of those blocks, fp32; None where weights are not quantised.
        states: by name, flat; of narrow states codes and, by the name with _scale, the scales of whole blocks.
    """

    weights: torch.Tensor
    weight_scale: torch.Tensor | None
    states: Mapping[str, torch.Tensor]


class MatrixRows(ABC):
    """A (V, C) matrix that is read in blocks of rows.

    Attributes:
        parameter: says which matrix it is, by identity, and its shape, dtype and requires_grad; its numbers may be elsewhere.
        streamed: whether they are. What a dry run counts of reads and writes then depends on all blocks of rows, not on one of them.
    """

    streamed = False

    def __init__(self, parameter: torch.Tensor):
        self.parameter = parameter

    @property
    def shape(self) -> torch.Size:
        """(V, C)."""
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored; of quantised rows what they pass for."""
        return self.parameter.dtype

    def distinct(self, blocks: Sequence[slice]) -> int:
        """How many of `blocks` a dry run goes through; see `lowmem.system.dry_run.representative`."""
        return len(blocks) if self.streamed else 1

    @abstractmethod
    def read(self, rows: slice) -> torch.Tensor:
        """Those rows as they are stored, not to be changed: an ordinary tensor, or a `CodedWeight`; `dense` makes numbers of both.

        Args:
            rows: where they are quantised, the first one begins at a multiple of 128 numbers.
        """

    @abstractmethod
    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """(n, C): the rows of those numbers, an ordinary tensor of `dtype`.

        Args:
            ids: (n,) int64.
        """

    @abstractmethod
    def updating(self, rows: slice) -> AbstractContextManager[Window]:
        """Weights and states of those rows; what the optimizer wrote there is theirs once the context is left.

        Args:
            rows: the first one begins at a multiple of 128 numbers, and so does what follows the last, if anything does.
        """


class ResidentRows(MatrixRows):
    """Rows of a parameter in memory.

    Args:
        window: of an optimizer, for `updating`: weights and states of `count` numbers from `start` on.
    Memory: none, where rows are not quantised.
    """

    def __init__(self, parameter: torch.Tensor, window: Callable[[torch.Tensor, int, int], Window] | None = None):
        super().__init__(parameter)
        self._window = window

    def read(self, rows: slice) -> torch.Tensor:
        weight = self.parameter.detach()
        if isinstance(weight, QuantizedWeight):
            return weight.some_rows(rows)
        return weight.rows(rows, weight.dtype) if isinstance(weight, CodedWeight) else weight[rows]

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.parameter.detach())

    @contextmanager
    def updating(self, rows: slice) -> Iterator[Window]:
        assert self._window is not None
        width = self.shape[1]
        yield self._window(self.parameter, rows.start * width, (rows.stop - rows.start) * width)


class GradientRows(ABC):
    """The gradient of a matrix, written in blocks of rows and read in such blocks later."""

    @abstractmethod
    def write(self, rows: slice, gradient: torch.Tensor) -> None:
        """Keep the gradient of those rows; `gradient` may be overwritten afterwards."""

    @abstractmethod
    def read(self, rows: slice) -> torch.Tensor:
        """The gradient of those rows, not to be changed."""


class ResidentGradient(GradientRows):
    """A gradient in memory.

    Args:
        gradient: (V, C).
    """

    def __init__(self, gradient: torch.Tensor):
        self.gradient = gradient

    def write(self, rows: slice, gradient: torch.Tensor) -> None:
        self.gradient[rows] = gradient

    def read(self, rows: slice) -> torch.Tensor:
        return self.gradient[rows]
