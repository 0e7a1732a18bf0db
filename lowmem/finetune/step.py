"""The loss of packed conversations on a model of transformers, and one optimizer step over micro-batches.

Shapes: B rows, T time.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from lowmem.config.finetune import FinetuneConfig, memory_remedies, micro_batch_sizes
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.base import MicroBatches
from lowmem.engine.recovery import HALF_APPLIED, cannot_be_repeated, repeat_with_smaller_micro_batches
from lowmem.finetune.hidden import last_hidden, plain_head
from lowmem.nn.loss import chunked_cross_entropy
from lowmem.nn.positions import segment_positions
from lowmem.optim.adamw import AdamW
from lowmem.optim.clipping import BlockClipping, clip_gradients, global_norm
from lowmem.optim.from_config import set_learning_rate
from lowmem.optim.lion import Lion
from lowmem.optim.low_bit import LowBitOptimizer


def batch_loss(model: Any, batch: Batch, denominator: float, device: torch.device) -> torch.Tensor:
    """Summed loss of the predicted tokens over `denominator`.

    Args:
        batch: with segments; those of a row see nothing of each other, unless it has one: then the usual mask is used.
    Memory: beside the activations one chunk of logits, see `lowmem.nn.loss`; where the head is no plain matrix those of every column in
        which a token is predicted.
    """
    inputs, targets = torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.targets).to(device)
    assert batch.segments is not None
    segments = torch.from_numpy(batch.segments).to(device)
    known: dict[str, Any] = {"input_ids": inputs, "use_cache": False}
    if batch.segments.max() > 1:
        same = segments.unsqueeze(2) == segments.unsqueeze(1)
        mask = (same & torch.ones_like(same[0]).tril()).unsqueeze(1)
        known |= {"attention_mask": _additive(mask, model.get_input_embeddings().weight.dtype), "position_ids": segment_positions(segments)}
    else:
        known["attention_mask"] = (segments > 0).long()
    head = plain_head(model)
    if head is not None:
        return chunked_cross_entropy(last_hidden(model, **known), *head, targets, denominator)
    wanted = torch.from_numpy((batch.targets != IGNORE_INDEX).any(0).nonzero()[0]).to(device)
    logits = model(**known, logits_to_keep=wanted).logits
    if logits.shape[1] != len(wanted):
        logits = logits[:, -inputs.shape[1] :][:, wanted]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets[:, wanted].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / denominator


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token may look, the lowest number elsewhere: the form that every attention of transformers takes."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class Stepper(MicroBatches):
    """Optimizer steps on the trainable parameters of a model.

    A step that runs out of memory before its update is done again with smaller micro-batches, as is an evaluation.

    Args:
        groups: from `parameter_groups`.
        config: micro_batch_size=auto takes the largest that is allowed.
    Memory: states of the trainable parameters; their gradients, with update=layerwise only one at a time.
    """

    def __init__(self, model: Any, groups: list[dict[str, Any]], config: FinetuneConfig, device: torch.device):
        super().__init__()
        optim = config.optim
        own: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "state_bits": optim.state_bits, "seed": config.seed}
        self.optimizer: LowBitOptimizer = AdamW(groups, eps=optim.eps, **own) if optim.name == "adamw" else Lion(groups, **own)
        self.optimizer.allocate_states()
        self.model, self.config, self.device = model, config, device
        self.micro_batch_size = micro_batch_sizes(config)[0]
        self.size_keys = ("batch_size" if config.update == "layerwise" else "micro_batch_size", "seq_len")
        self.clipping = BlockClipping(optim.clip, "previous", blocks=1)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if config.update == "layerwise":
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._apply_now)

    def step(self, batch: Batch, lr: float) -> tuple[float, float]:
        """One update; loss and gradient norm. Nothing changes if either is not finite, except with update=layerwise what came before it.

        Raises:
            MemoryBudgetError: memory ran out and no smaller micro-batch helps, or where the step could not be repeated.
        """
        self.model.train()
        set_learning_rate(self.optimizer, lr)
        if self.config.update == "layerwise":
            self.clipping.forget()
            with cannot_be_repeated(self, HALF_APPLIED):
                loss = self._backward(batch)
            if math.isfinite(loss):
                return loss, self.clipping.end_step()
            self.clipping.forget()
            return loss, math.nan
        loss, norm = repeat_with_smaller_micro_batches(self, partial(self._clipped_gradients, batch), self.optimizer.zero_grad)
        if math.isfinite(loss) and math.isfinite(norm):
            with cannot_be_repeated(self, HALF_APPLIED):
                self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def memory_remedies(self) -> list[str]:
        """Settings of `lowmem finetune` that are not in force and would take less memory."""
        return memory_remedies(self.config)

    def _clipped_gradients(self, batch: Batch) -> tuple[float, float]:
        """Loss, and the norm before clipping."""
        loss = self._backward(batch)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = global_norm(gradients).item()
        if math.isfinite(loss) and math.isfinite(norm):
            clip_gradients(gradients, norm, self.config.optim.clip)
        return loss, norm

    def _backward(self, batch: Batch) -> float:
        """Gradients of all micro-batches, summed; the loss. Micro-batches whose loss is not finite add nothing."""
        denominator, losses = float(max(1, batch.target_count())), []
        for start in range(0, len(batch), self.micro_batch_size):
            loss = batch_loss(self.model, batch.rows(start, start + self.micro_batch_size), denominator, self.device)
            losses.append(loss.item())
            if math.isfinite(losses[-1]):
                loss.backward()
            del loss
        return math.fsum(losses)

    def _apply_now(self, parameter: torch.Tensor) -> None:
        """Update a parameter whose gradient is complete, and free the gradient."""
        assert parameter.grad is not None
        factor = self.clipping.factor([parameter.grad], unscale=1.0)
        if not math.isnan(factor):
            self.optimizer.begin(parameter)
            self.optimizer.update(parameter, parameter.grad, grad_scale=factor)
        parameter.grad = None

    @torch.no_grad()
    def evaluate(self, batches: Any) -> float:
        """Mean loss over the predicted tokens."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in batches:
            total += repeat_with_smaller_micro_batches(self, partial(self._summed_loss, batch), lambda: None)
            count += batch.target_count()
        return total / max(1, count)

    def _summed_loss(self, batch: Batch) -> float:
        starts = range(0, len(batch), self.micro_batch_size)
        return math.fsum(batch_loss(self.model, batch.rows(n, n + self.micro_batch_size), 1.0, self.device).item() for n in starts)
