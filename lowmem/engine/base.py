"""The contract of an engine: one training step, evaluation, state in and out. The loop knows nothing else of it (D4)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lowmem.data.batch import Batch
from lowmem.models.base import LanguageModel
from lowmem.nn.lorptize import following_layers
from lowmem.nn.quantized import stored_tensors
from lowmem.system.errors import ConfigError
from lowmem.system.tensors import all_finite


class MicroBatches:
    """What takes its steps in micro-batches and can lower them; see `lowmem.engine.recovery`.

    Attributes:
        device: where it computes.
        micro_batch_size: sequences computed at once; lowered when memory runs out.
        failed_micro_batch_size: the smallest size known to run out of memory; 0 if none is.
        messages: what a person should know of recoveries; whoever shows them empties the list.
        size_keys: names of the settings for the micro-batch and the length of a sequence, for messages.
    """

    device: torch.device
    micro_batch_size: int = 1
    failed_micro_batch_size: int = 0
    messages: list[str]
    size_keys: tuple[str, str] = ("train.micro_batch_size", "data.seq_len")

    def __init__(self) -> None:
        self.messages = []

    def memory_remedies(self) -> list[str]:
        """Settings that are not in force and would take less memory, as "key=value", the most effective first."""
        return []

    def set_micro_batch_size(self, size: int) -> None:
        """Compute `size` sequences at once from now on."""
        self.micro_batch_size = size

    def micro_batch_state(self) -> dict[str, int]:
        """For the checkpoint: the present micro-batch, and the smallest that failed."""
        return {"size": self.micro_batch_size, "failed": self.failed_micro_batch_size}

    def restore_micro_batch(self, state: dict) -> None:
        """Take over from a checkpoint which size failed, and the size found instead if the configured one would fail again.

        Args:
            state: what `save` returned; "micro_batch" may be missing.
        """
        saved = state.get("micro_batch", {"size": self.micro_batch_size, "failed": 0})
        self.failed_micro_batch_size = saved["failed"]
        if 0 < saved["failed"] <= self.micro_batch_size:
            self.set_micro_batch_size(saved["size"])


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def on_device(batch: Batch, device: torch.device) -> Tensors:
    """Inputs, targets and, where rows hold several conversations, segments."""
    inputs, targets = (torch.from_numpy(part).to(device, non_blocking=True) for part in (batch.inputs, batch.targets))
    return inputs, targets, None if batch.segments is None else torch.from_numpy(batch.segments).to(device, non_blocking=True)


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


class Engine(MicroBatches, ABC):
    """Computes training steps on one model, in micro-batches of this rank.

    Attributes, beside those of `MicroBatches`:
        model: the plain module, not wrapped.
        rank, world_size: this process among those that share the global batch.
        longest_seq_len: tokens of the sequences that micro_batch_size counts; 0 is the length of each batch.
    """

    model: LanguageModel
    rank: int = 0
    world_size: int = 1
    longest_seq_len: int = 0

    def rows_at_once(self, seq_len: int, sequences: int = 0) -> int:
        """Rows of `seq_len` tokens computed at once: of shorter sequences more fit.

        Args:
            sequences: of the longest length; 0 takes the micro-batch.
        """
        return (sequences or self.micro_batch_size) * max(1, self.longest_seq_len // seq_len)

    @abstractmethod
    def step(self, batch: Batch, lr: float) -> StepResult:
        """One optimizer step on a global batch, the same `batch` on every rank; each rank computes its own rows.

        Args:
            batch: global_batch_size sequences.
            lr: learning rate of this step.
        Raises:
            MemoryBudgetError: memory ran out and no smaller micro-batch helps, or where the step could not be repeated.
        """

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over all predicted tokens of `batches`; weights, states and RNG are left as they were.

        Raises:
            MemoryBudgetError: memory ran out with one sequence at a time.
        """

    @abstractmethod
    def rehearse(self, batch: Batch) -> None:
        """Take the memory that steps on batches like this one and evaluations will take, and lower the micro-batch until it is there.

        Weights, states, loss scale and RNG are left as they were.

        Args:
            batch: a global batch of the longest sequences of the run.
        Raises:
            MemoryBudgetError: memory ran out with one sequence at a time.
        """

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

    def lorpt_rank(self, patterns: Mapping[str, object]) -> int:
        """The largest rank of the LoRPt layers that follow the model's rank; 0 if there are none.

        Args:
            patterns: names of layers that have a rank of their own.
        """
        return max((layer.rank for _, layer in following_layers(self.model, patterns)), default=0)

    def set_rank(self, rank: int, patterns: Mapping[str, object], *, seed: int, step: int) -> None:
        """Grow or shrink the LoRPt layers that follow the model's rank; optimizer states follow. Between steps only.

        Args:
            patterns: names of layers that have a rank of their own and keep it.
            seed, step: of the rows that growing adds.
        Raises:
            ConfigError: this engine cannot, or the rank saves nothing in some layer; nothing has changed then.
        """
        raise ConfigError("this engine cannot change the rank of a model; use engine.name=local, or drop the rank schedule")

    def weights_are_finite(self) -> bool:
        """Whether no weight of this rank is NaN or infinite; of quantised weights their scales are looked at.

        Memory: two numbers at a time.
        """
        return all(all_finite(tensor) for tensor in stored_tensors(dict(self.model.named_parameters())).values())

    @abstractmethod
    def memory_components(self) -> dict[str, int]:
        """Bytes that this rank keeps between and during steps, by arithmetic: weights, gradients, optimizer_states."""

    def traffic(self) -> dict[str, int]:
        """Bytes read from and written to where weights, states and boundary activations live, if that is elsewhere, since the last call."""
        return {}

    def describe(self) -> list[str]:
        """What a person would otherwise not see of how updates are made."""
        return []

    def sum_over_ranks(self, value: float) -> float:
        """The sum of every rank's `value`, on every rank."""
        return value

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on at least one."""
        return flag

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """Release processes and groups."""
