"""The contract of an engine: one training step, evaluation, state in and out. The loop knows nothing else of it (D4)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lowmem.data.batch import Batch
from lowmem.models.base import LanguageModel


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        loss: mean over all predicted tokens of the global batch, over all ranks.
        grad_norm: global norm before clipping.
        skipped: "" when the weights were updated; "nonfinite" when loss or gradients were not finite (a bad step);
            "loss_scale" when fp16 overflowed and the loss scale was lowered (normal). Skipped steps leave weights and
            optimizer states untouched; in a layerwise step those of the blocks above the first bad gradient are updated already.
    """

    loss: float
    grad_norm: float
    skipped: Literal["", "nonfinite", "loss_scale"]


class Engine(ABC):
    """Computes training steps on one model.

    Attributes:
        model: the plain module, not wrapped.
        device: where this rank computes.
        rank, world_size: this process among those that share the global batch.
        micro_batch_size: sequences computed at once on this rank.
    """

    model: LanguageModel
    device: torch.device
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int = 1

    @abstractmethod
    def step(self, batch: Batch, lr: float) -> StepResult:
        """One optimizer step on a global batch, the same `batch` on every rank; each rank computes its own rows.

        Args:
            batch: global_batch_size sequences.
            lr: learning rate of this step.
        """

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over all predicted tokens of `batches`; weights, states and RNG are left as they were."""

    @abstractmethod
    def save(self, directory: Path) -> dict:
        """Write weights and optimizer states below `directory` as safetensors; every rank calls it.

        Returns:
            The rest of the state as JSON-ready values, the same on every rank.
        Memory: one tensor at a time.
        """

    @abstractmethod
    def load(self, directory: Path, state: dict) -> None:
        """Restore what `save` wrote and returned, bit for bit; every rank calls it.

        Raises:
            CheckpointError: files or tensors are missing, or have other shapes.
        """

    @abstractmethod
    def load_weights(self, directory: Path) -> None:
        """Restore the weights alone."""

    @abstractmethod
    def memory_components(self) -> dict[str, int]:
        """Bytes that this rank keeps between and during steps, by arithmetic: weights, gradients, optimizer_states."""

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on at least one."""
        return flag

    def barrier(self) -> None:  # noqa: B027  (one process waits for nobody)
        """Wait until every rank is here."""

    def close(self) -> None:  # noqa: B027
        """Release processes and groups."""
