"""One process, one device: the engine with the least memory."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from lowmem.config.schema import DistillConfig, OptimConfig
from lowmem.data.batch import Batch
from lowmem.engine.base import Engine, StepResult, on_device
from lowmem.engine.recovery import HALF_APPLIED, cannot_be_repeated, repeat_with_smaller_micro_batches
from lowmem.engine.state import Scalars, load_optimizer_tensors, optimizer_tensors, random_state, restore_random_state
from lowmem.engine.storage.blocks import Storage
from lowmem.models.base import LanguageModel, move_to, saved_tensors, weight_dtype
from lowmem.nn.lorptize import adopt_ranks, change_rank, check_rank, following_layers
from lowmem.nn.loss import SoftTargets
from lowmem.nn.quantized import stored_bytes, stored_tensors
from lowmem.optim.clipping import clip_gradients, global_norm
from lowmem.optim.from_config import allocate_states, build_optimizer, narrower_states, set_learning_rate
from lowmem.optim.kernels.formats import mix_key
from lowmem.optim.low_bit import LowBitOptimizer, resize_states
from lowmem.system.devices import Precision
from lowmem.system.dry_run import representative
from lowmem.system.errors import ConfigError
from lowmem.system.tensors import all_finite, check_tensors, copy_tensors, read_tensors, tensor_shapes, write_tensors


class Teacher:
    """A model in evaluation mode, without gradients.

    Args:
        model: on the device of the run.
        distill: how much it counts.
    Memory: its weights; while it computes, one block's activations, and its last hidden states until the student's loss is known.
    """

    def __init__(self, model: LanguageModel, distill: DistillConfig):
        self.model, self.distill = model.eval().requires_grad_(False), distill

    @torch.no_grad()
    def soft_targets(self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor | None = None) -> SoftTargets:
        """What the model predicts after each token, to be multiplied out chunk by chunk."""
        hidden = self.model.embed(tokens_BT, segments_BT=segments_BT)
        for index in range(len(self.model.blocks)):
            hidden = self.model.block(index, segments_BT)(hidden)
        return SoftTargets(*self.model.head_product(hidden), self.distill.weight, self.distill.temperature)


_MIN_LOSS_SCALE = 1.0
T = TypeVar("T")


class LocalEngine(Engine):
    """Accumulates the gradients of all micro-batches, clips, updates.

    A step or an evaluation that runs out of memory is done again with a smaller micro-batch. The update is not part of that: its states
    are allocated here, and of the optimizers only lion-pytorch's and Spectron allocate more.

    Args:
        model: moved to `device`; its dtype is what is stored.
        optim: the optimizer; schedules are the loop's business.
        teacher: a model to learn from, on `device`; None learns from the text alone.
        storage: where the model's blocks live, which has them already; None leaves them on the device.
        precision: what is computed in; autocast where it differs from the stored dtype.
        seed: of stochastic rounding.
    Memory: weights, one gradient and the optimizer states per parameter, and one micro-batch of activations. Gradients of 16-bit weights
        have 16 bits where the global batch is one micro-batch, else 32.
    """

    def __init__(
        self,
        model: LanguageModel,
        optim: OptimConfig,
        *,
        device: torch.device,
        precision: Precision,
        micro_batch_size: int,
        seed: int = 0,
        teacher: Teacher | None = None,
        storage: Storage | None = None,
    ):
        super().__init__()
        self.teacher, self.storage = teacher, storage or Storage()
        self.model: LanguageModel = move_to(model, device)
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.max_norm, self.optim = optim.clip, optim
        self.optimizer = self._build_optimizer(model, optim, seed)
        if self.storage.streams:
            self.storage.adopt(model.blocks, self.optimizer)
        allocate_states(self.optimizer)
        self.scaler: Any = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        stored = weight_dtype(model)
        compute = {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)
        self.autocast_dtype = None if compute == stored else compute
        self._narrow = [p for p in self.model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]

    def _build_optimizer(self, model: LanguageModel, optim: OptimConfig, seed: int) -> torch.optim.Optimizer:
        return build_optimizer(model, optim, seed=seed)

    def step(self, batch: Batch, lr: float) -> StepResult:
        self.model.train()
        set_learning_rate(self.optimizer, lr)
        loss, norm, applied = self._repeat(partial(self._gradients, batch))
        with cannot_be_repeated(self, HALF_APPLIED):
            if applied and self.optim.backend == "bitsandbytes":
                self._round_sums()
            if applied:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)  # gradients must not be alive during the next forward pass
        if applied:
            return StepResult(loss, norm, skipped="")
        searching = self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() > _MIN_LOSS_SCALE
        return StepResult(loss, norm, skipped="loss_scale" if searching else "nonfinite")

    def evaluate(self, batches: Iterable[Batch]) -> float:
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                for loss in self._repeat(partial(self._losses, batch)):
                    total += loss
                count += batch.target_count()
        return total / count

    def rehearse(self, batch: Batch) -> None:
        random = random_state(self.device)
        try:
            self._repeat(partial(self._try_step, batch))
            self._repeat(partial(self._try_evaluation, batch))
        finally:
            self._discard()
            restore_random_state(random, self.device)

    def save(self, directory: Path) -> dict:
        tensors, scalars = optimizer_tensors(self.model, self.optimizer)
        elsewhere = self.storage.saved_states(dict(self.model.named_parameters()))
        write_tensors(directory / "model.safetensors", self.storage.saved(saved_tensors(self.model)))
        write_tensors(directory / "optimizer.safetensors", {**tensors, **elsewhere})
        return {
            "engine": "local",
            "optimizer_scalars": scalars,
            "loss_scale": self.scaler.state_dict(),
            "random": random_state(self.device),
            "micro_batch": self.micro_batch_state(),
        }

    def load(self, directory: Path, state: dict) -> None:
        self.load_weights(directory)
        self._load_states(directory / "optimizer.safetensors", state["optimizer_scalars"])
        self.restore_micro_batch(state)
        if state["loss_scale"]:
            self.scaler.load_state_dict(state["loss_scale"])
        restore_random_state(state["random"], self.device)

    def load_weights(self, directory: Path) -> None:
        path = directory / "model.safetensors"
        if not self.storage.streams:
            adopt_ranks(self.model, tensor_shapes(path))
        check_tensors(path, stored_tensors(saved_tensors(self.model)))
        for tensors in self.storage.each_part(saved_tensors(self.model), changed=True):
            copy_tensors(path, stored_tensors(tensors))
        for rows in self.storage.each_rows(saved_tensors(self.model), changed=True):
            copy_tensors(path, rows)

    def _load_states(self, path: Path, scalars: Scalars) -> None:
        elsewhere = self.storage.saved_states(dict(self.model.named_parameters()))
        load_optimizer_tensors(self.model, self.optimizer, read_tensors(path, skip=elsewhere), scalars, elsewhere=elsewhere)
        allocate_states(self.optimizer)  # a checkpoint from before the first step may hold none
        check_tensors(path, elsewhere, more=True)
        for states in self.storage.each_state(dict(self.model.named_parameters())):
            copy_tensors(path, states)

    def set_rank(self, rank: int, patterns: Mapping[str, object], *, seed: int, step: int) -> None:
        if self.storage.streams:
            raise ConfigError("the rank of a model whose blocks are elsewhere cannot change; use train.weights_at=device")
        layers = list(following_layers(self.model, patterns))
        check_rank(layers, rank)
        for position, (_, layer) in enumerate(layers):
            old = {factor: tuple(factor.shape) for factor in (layer.down, layer.up)}
            grown = rank > layer.rank
            if rank == layer.rank:
                continue
            change_rank(layer, rank, torch.Generator().manual_seed(mix_key(mix_key(seed, step), position)))
            for factor, shape in old.items():
                resize_states(self.optimizer, factor, shape, grown=grown)

    def weights_are_finite(self) -> bool:
        named = dict(self.model.named_parameters())
        whole = (tensor for part in self.storage.each_part(named) for tensor in stored_tensors(part).values())
        rows = (part.tensor for parts in self.storage.each_rows(named) for part in parts.values())
        return all(map(all_finite, whole)) and all(map(all_finite, rows))

    def memory_components(self) -> dict[str, int]:
        weights = stored_bytes(parameter for parameter in self.model.parameters() if not self.storage.has(parameter))
        gradients = sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in self.model.parameters() if p.requires_grad)
        states, _ = optimizer_tensors(self.model, self.optimizer)
        taught = {} if self.teacher is None else {"teacher": sum(self.teacher.model.component_bytes().values())}
        return {
            **taught,
            **self.storage.component_bytes(),
            "weights": weights,
            "gradients": gradients,
            "optimizer_states": sum(state.numel() * state.element_size() for state in states.values()),
        }

    def describe(self) -> list[str]:
        return [self.optimizer.describe()] if isinstance(self.optimizer, LowBitOptimizer) else []

    def memory_remedies(self) -> list[str]:
        checkpointing = [] if self.model.activation_checkpointing == "block" else ["train.activation_checkpointing=block"]
        if self.optim.backend == "bitsandbytes":
            return [*checkpointing, "optim.backend=lowmem"]
        layerwise = [] if self.optim.clip_by == "global" else ["train.update=layerwise"]
        return [*checkpointing, *layerwise, *narrower_states(self.optim)]

    def _repeat(self, work: Callable[[], T]) -> T:
        return repeat_with_smaller_micro_batches(self, work, self._discard)

    def _discard(self) -> None:
        """Drop the gradients of an unfinished step, and that they were unscaled."""
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            self.scaler = torch.amp.GradScaler(self.device.type)
            self.scaler.load_state_dict(state)

    def _gradients(self, batch: Batch) -> tuple[float, float, bool]:
        """Loss, norm before clipping, and whether the gradients, now clipped, may be applied."""
        loss = self._accumulate(batch)
        self.scaler.unscale_(self.optimizer)
        gradients = self._kept_gradients()
        norm = global_norm(gradients).item()
        applied = math.isfinite(loss) and math.isfinite(norm)
        if applied:
            clip_gradients(gradients, norm, self.max_norm)
        return loss, norm, applied

    def _round_sums(self) -> None:
        """fp32 sums as gradients in the dtype of their weights, which bitsandbytes insists on."""
        for parameter in self._narrow:
            if parameter.grad is not None and parameter.grad.dtype != parameter.dtype:
                rounded, parameter.grad = parameter.grad.to(parameter.dtype), None
                parameter.grad_dtype = parameter.dtype
                parameter.grad = rounded

    def _kept_gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]

    def _losses(self, batch: Batch) -> list[float]:
        return [self._loss(micro_batch, denominator=1.0).item() for micro_batch in self._micro_batches(batch)]

    def _try_step(self, batch: Batch) -> None:
        """The second micro-batch meets the gradients of the first, as every later one does."""
        self.model.train()
        self._accumulate(batch.rows(0, 2 * self.micro_batch_size))
        global_norm(self._kept_gradients())
        self._discard()

    def _try_evaluation(self, batch: Batch) -> None:
        self.model.eval()
        with torch.no_grad():
            self._losses(batch.rows(0, self.micro_batch_size))
        self.model.train()

    def _accumulate(self, batch: Batch) -> float:
        """Gradients of the mean loss over the whole global batch, whatever the micro-batch; returns that loss."""
        denominator = max(1, batch.target_count())
        self._sum_in_fp32(several=len(batch) > self.rows_at_once(batch.inputs.shape[1]))
        losses = []
        for micro_batch in self._micro_batches(batch):
            loss = self._loss(micro_batch, denominator)
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return math.fsum(loss.item() for loss in losses)

    def _sum_in_fp32(self, several: bool) -> None:
        """Have autograd add the gradients of 16-bit weights in fp32: in bf16 a sum of 64 micro-batches errs by 0.8 %."""
        for parameter in self._narrow:
            parameter.grad_dtype = torch.float32 if several else parameter.dtype

    def _loss(self, batch: Batch, denominator: float) -> torch.Tensor:
        inputs, targets, segments = on_device(batch, self.device)
        with self.autocast():
            teacher = self.teacher if self.model.training else None
            soft_targets = None if teacher is None else teacher.soft_targets(inputs, segments)
            return self.model(inputs, targets, denominator, segments_BT=segments, soft_targets=soft_targets)

    def _micro_batches(self, batch: Batch) -> Iterable[Batch]:
        at_once, like = self.rows_at_once(batch.inputs.shape[1]), next(self.model.parameters())
        starts = range(0, len(batch), at_once)
        return (batch.rows(start, start + at_once) for start in representative(starts, like, distinct=2))

    def autocast(self) -> AbstractContextManager:
        """Compute in the precision of the run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast("cpu" if self.device.type == "meta" else self.device.type, dtype=self.autocast_dtype)
