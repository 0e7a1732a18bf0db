"""DeepSpeed behind the engine contract: ZeRO 0 to 3, offload to host memory, one rank or many.

Micro-batches are weighted as in the local engine, whatever the number of ranks: every loss is a sum divided by the number of
predicted tokens of the *global* batch. DeepSpeed averages gradients over ranks, so each rank's loss is first multiplied by the
number of ranks, and DeepSpeed's own division by the accumulation steps is switched off.

Memory that runs out on one rank is everyone's business. Below stage 3 a forward pass does not communicate: the ranks tell each other
how it went, and all of them start the step or the evaluation again with a smaller micro-batch. In a backward pass, in stage 3 and in
DeepSpeed's own step the other ranks wait in the middle of a collective operation, or gradients are in DeepSpeed's buckets: the run ends
with an error, except for the backward pass of stage 0 on a single rank, which leaves nothing but gradients behind.
"""

import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem.config.schema import RunConfig
from lowmem.data.batch import Batch
from lowmem.engine.base import Engine, StepResult, on_device
from lowmem.engine.deepspeed.ds_config import build_deepspeed_config, offloads_optimizer, zero_stage
from lowmem.engine.deepspeed.operators import build_deepspeed_ops, put_ninja_on_path
from lowmem.engine.deepspeed.processes import destroy_process_group, import_deepspeed, init_process_group, local_rank
from lowmem.engine.deepspeed.saving import load_optimizer, load_weights, plug_in, save_optimizer, save_weights
from lowmem.engine.recovery import cannot_be_repeated, first_line, release_memory, repeat_with_smaller_micro_batches
from lowmem.engine.state import random_state, restore_random_state
from lowmem.memory.limits import is_out_of_memory
from lowmem.models.base import LanguageModel
from lowmem.nn.quantized import CodedWeight, stored_bytes
from lowmem.optim.clipping import clip_gradients, global_norm
from lowmem.optim.from_config import build_optimizer, narrower_states, set_learning_rate
from lowmem.optim.kernels.formats import StateBits, mix_key, state_bits_of
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.system.errors import CheckpointError


def memory_components(ds_engine: Any) -> dict[str, int]:
    """Bytes of this rank by component: weights with the fp32 master copy, gradients, optimizer_states.

    Optimizer states exist from the first step on.
    """
    parameters = list(ds_engine.module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    held = [parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter for parameter in parameters]
    master = list(partitions(ds_engine))
    inner = getattr(ds_engine.optimizer, "optimizer", ds_engine.optimizer)
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "weights": stored_bytes(held) + _bytes(master),
        "gradients": _gradient_bytes(ds_engine, trained, master),
        "optimizer_states": _bytes(states),
    }


def _gradient_bytes(ds_engine: Any, parameters: list[torch.Tensor], master: list[torch.Tensor]) -> int:
    """Gradients at the end of accumulation: whole below stage 2, this rank's share from there on, and the fp32 share to update with."""
    stage = ds_engine.zero_optimization_stage()
    whole = _bytes(parameters)
    if stage == 0:
        return whole
    accumulated = torch.finfo(ds_engine.get_data_types()[1]).bits // 8 * sum(partition.numel() for partition in master)
    if stage == 1:
        return whole + accumulated
    return accumulated + _bytes(master)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class DeepSpeedEngine(Engine):
    """Trains on every rank of a DeepSpeed launch, or on one rank without a launcher.

    Args:
        model: moved to `device` and then DeepSpeed's; its dtype is what is stored.
        config: resolved: train.precision is fp32, bf16 or fp16.
        device: of this rank.
        micro_batch_size: sequences computed at once on this rank; divides the rank's share of the global batch.
    Raises:
        ConfigError: DeepSpeed is not installed, or engine.config contradicts the configuration.
    Memory: stage 0 keeps weights, gradients and states whole. Stages 1, 2, 3 divide the states and an fp32 master copy, then also
        the gradients, then also the weights by the number of ranks; every rank builds the whole model first.
    """

    def __init__(self, model: LanguageModel, config: RunConfig, *, device: torch.device, micro_batch_size: int):
        super().__init__()
        init_process_group(device)
        deepspeed = import_deepspeed(device.type)
        self.rank, self.world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
        self.device, self.micro_batch_size, self.longest_seq_len = device, micro_batch_size, config.data.seq_len
        self.max_norm, self.config = config.optim.clip, config
        document = build_deepspeed_config(config, world_size=self.world_size, micro_batch_size=micro_batch_size)
        self.zero_stage = zero_stage(document)
        offload = offloads_optimizer(document)
        if offload and config.optim.state_bits == 32:
            self._compile_operators()
        optimizer = build_optimizer(model.to(device), config.optim, seed=config.train.seed, offload=offload)
        if self.zero_stage:
            separate_by_state_width(optimizer, self.world_size)
        _forget_autocast()
        self._linear = torch.nn.functional.linear
        with _codes_aside(model), redirect_stdout(io.StringIO()):  # BF16_Optimizer prints its memory use; standard output belongs to --json
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=document)
        self.model: LanguageModel = model
        prepare_optimizer(self._engine, optimizer)
        plug_in(self._engine, self.rank)

    def step(self, batch: Batch, lr: float) -> StepResult:
        self._engine.train()
        set_learning_rate(self._engine.optimizer, lr)
        loss = repeat_with_smaller_micro_batches(self, partial(self._accumulate, batch), self._discard)
        with self._fatal("in the update"):
            return self._update_whole(loss) if self.zero_stage == 0 else self._update_partitioned(loss)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        self._engine.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                total += self._sum_over_ranks(repeat_with_smaller_micro_batches(self, partial(self._evaluate_share, batch), self._discard))
                count += batch.target_count()
        return total / count

    def rehearse(self, batch: Batch) -> None:
        """Does nothing: ZeRO's hooks communicate and fill buckets during backward, so a pass that is thrown away cannot be taken back."""

    def save(self, directory: Path) -> dict:
        save_weights(self._engine, directory / "model.safetensors", write=self.rank == 0)
        save_optimizer(self._engine, directory)
        return {
            "engine": "deepspeed",
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
            "random": self._random_states(),
            "micro_batch": self.micro_batch_state(),
        }

    def load(self, directory: Path, state: dict) -> None:
        for name, mine in (("engine", "deepspeed"), ("world_size", self.world_size), ("zero_stage", self.zero_stage)):
            if state.get(name) != mine:
                raise CheckpointError(
                    f"{directory} was written with {name}={state.get(name)}, this run has {name}={mine}; "
                    "resume as it was started, or begin another run"
                )
        self.load_weights(directory)
        load_optimizer(self._engine, directory)
        self.restore_micro_batch(state)
        restore_random_state(state["random"][self.rank], self.device)

    def load_weights(self, directory: Path) -> None:
        load_weights(self._engine, directory / "model.safetensors")

    def memory_components(self) -> dict[str, int]:
        return memory_components(self._engine)

    def memory_remedies(self) -> list[str]:
        checkpointing = [] if self.config.train.activation_checkpointing == "block" else ["train.activation_checkpointing=block"]
        return [*checkpointing, *narrower_states(self.config.optim)]

    def sum_over_ranks(self, value: float) -> float:
        return self._sum_over_ranks(value)

    def any_rank(self, flag: bool) -> bool:
        return self._sum_over_ranks(float(flag)) > 0

    def barrier(self) -> None:
        torch.distributed.barrier()

    def close(self) -> None:
        self._release()
        destroy_process_group()

    def _release(self) -> None:
        """Take DeepSpeed off the model, whose hooks would otherwise keep all of it alive."""
        self._engine.destroy()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        torch.nn.functional.linear = self._linear  # ZeRO 3 puts its own there, for every module of the process
        del self._engine

    def _compile_operators(self) -> None:
        """Before DeepSpeed does it in silence, and on one rank of each machine, because ranks that compile at once can block."""
        put_ninja_on_path()
        if local_rank() == 0:
            build_deepspeed_ops(self.device.type, report=lambda line: print(line, file=sys.stderr))
        self.barrier()

    def _accumulate(self, batch: Batch) -> float:
        """Forward and backward over this rank's rows; the mean loss of the global batch."""
        denominator = max(1, batch.target_count()) / self.world_size
        share = -(-len(batch) // self.world_size)  # a schedule of lengths makes batches that the ranks do not divide
        rows = batch.padded(share * self.world_size).rows(self.rank * share, (self.rank + 1) * share)
        at_once = self.rows_at_once(batch.inputs.shape[1])
        last = (share - 1) // at_once * at_once
        recoverable = self.zero_stage == 0 and self.world_size == 1
        losses: list[torch.Tensor] = []
        for start in range(0, share, at_once):
            self._engine.set_gradient_accumulation_boundary(start == last)
            loss = self._loss_everywhere(rows.rows(start, start + at_once), denominator)
            losses.append(loss.detach())
            weight = 1.0
            if start == last:
                mean = self._sum_over_ranks(math.fsum(torch.stack(losses).tolist())) / self.world_size
                if not math.isfinite(mean):
                    weight = math.nan  # a loss can overflow where gradients do not; ZeRO discards a step by its gradients
            # The product is a tensor of its own even for weight 1: DeepSpeed (0.19.8, stage 0) divides the gradient of the very
            # tensor that forward returned by the accumulation steps, in spite of scale_wrt_gas=False.
            with nullcontext() if recoverable else self._fatal("in a backward pass"):
                self._engine.backward(loss * weight, scale_wrt_gas=False)
        return mean

    def _discard(self) -> None:
        """Forget the gradients of the micro-batches so far, as DeepSpeed (0.19.8) does after an overflow, and that there were any.

        Called between backward passes: buckets are empty then.
        """
        optimizer = self._engine.optimizer
        self._engine.zero_grad()
        if self.zero_stage:
            optimizer.zero_grad()  # also the fp32 sums of BF16_Optimizer, stage 1 in bf16
        if hasattr(optimizer, "micro_step_id"):
            optimizer.micro_step_id = -1
        for name in ("averaged_gradients", "all_grad_tensors"):
            sums = getattr(optimizer, name, {})
            for group in sums:
                sums[group] = None

    def _fatal(self, where: str) -> AbstractContextManager:
        return cannot_be_repeated(self, f"{where}, which cannot be done again under DeepSpeed; go on from the last checkpoint")

    def _update_whole(self, loss: float) -> StepResult:
        """Stage 0: every rank holds the averaged gradients and updates all weights, as the local engine does."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            scaler.unscale_(self._engine.optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = global_norm(gradients).item()
        applied = not self.any_rank(not (math.isfinite(loss) and math.isfinite(norm)))
        if applied:
            clip_gradients(gradients, norm, self.max_norm)
            self._engine.step()
            return StepResult(loss, norm, skipped="")
        self._engine.zero_grad()
        if scaler is not None:
            scaler.update()
        return StepResult(loss, norm, skipped=self._reason(loss, scaler.get_scale() if scaler is not None else 1.0))

    def _update_partitioned(self, loss: float) -> StepResult:
        """Stages 1 to 3: DeepSpeed finds the norm over all ranks, and discards the step on all of them if it is not finite."""
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if self._engine.was_step_applied():
            return StepResult(loss, norm, skipped="")
        # DeepSpeed (0.19.8, stages 1 and 2, offload, fp32 accumulation of bf16) forgets these in a discarded step; their NaN would
        # be added to every later gradient.
        averaged = getattr(self._engine.optimizer, "averaged_gradients", {})
        for group in averaged:
            averaged[group] = None
        scale = getattr(self._engine.optimizer, "loss_scaler", None)
        return StepResult(loss, norm, skipped=self._reason(loss, scale.cur_scale if scale is not None else 1.0))

    @staticmethod
    def _reason(loss: float, loss_scale: float) -> Literal["nonfinite", "loss_scale"]:
        return "loss_scale" if math.isfinite(loss) and loss_scale > 1.0 else "nonfinite"

    def _evaluate_share(self, batch: Batch) -> float:
        """Summed loss of every `world_size`-th micro-batch; each rank runs as many, because ZeRO 3 gathers weights together."""
        at_once = self.rows_at_once(batch.inputs.shape[1])
        starts = range(0, len(batch), at_once)
        total = 0.0
        for round_start in range(0, len(starts), self.world_size):
            mine = round_start + self.rank
            start = starts[min(mine, len(starts) - 1)]
            loss = self._loss_everywhere(batch.rows(start, start + at_once), denominator=1.0).item()
            total += loss if mine < len(starts) else 0.0
        return total

    def _loss_everywhere(self, batch: Batch, denominator: float) -> torch.Tensor:
        """This rank's loss.

        Raises:
            MemoryError: on every rank, if memory ran out on one.
            MemoryBudgetError: memory ran out in stage 3, where weights are gathered in between.
        """
        if self.zero_stage == 3:
            with self._fatal("in a forward pass of stage 3"):
                return self._loss(batch, denominator)
        failure = ""
        try:
            loss = self._loss(batch, denominator)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        if failure:
            release_memory(self.device)
        if self.world_size > 1 and self.any_rank(bool(failure)):
            failure = failure or "on another rank"
        if failure:
            raise MemoryError(failure)
        return loss

    def _loss(self, batch: Batch, denominator: float) -> torch.Tensor:
        inputs, targets, segments = on_device(batch, self.device)
        return self._engine(inputs, targets, denominator, segments_BT=segments)

    def _sum_over_ranks(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def _random_states(self) -> list[dict[str, str]]:
        """The generators of every rank, known to every rank."""
        mine = torch.frombuffer(bytearray(json.dumps(random_state(self.device)).encode()), dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(everyone, mine)  # equal lengths: all ranks have generators of the same kinds
        return [json.loads(bytes(text.tolist())) for text in everyone]


@contextmanager
def _codes_aside(model: torch.nn.Module) -> Iterator[None]:
    """Hide frozen weights that are kept as codes: DeepSpeed would cast and broadcast them, and every rank has read the same ones."""
    layers = [module for module in model.modules() if isinstance(module._parameters.get("weight"), CodedWeight)]
    hidden = [module._parameters.pop("weight") for module in layers]
    try:
        yield
    finally:
        for module, weight in zip(layers, hidden, strict=True):
            module.register_parameter("weight", weight)


def _forget_autocast() -> None:
    """DeepSpeed remembers autocast in a global, and lets it change the ZeRO stages of a later engine in the same process."""
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None


def separate_by_state_width(optimizer: torch.optim.Optimizer, ranks: int) -> None:
    """Give parameters whose states have other widths groups of their own, before ZeRO flattens groups; for lowmem's optimizers only.

    Flattened with others, norms and biases would get narrow states like those, and rows would share blocks.

    Args:
        ranks: that the flattened groups are divided among.
    """
    if not isinstance(optimizer, LowBitOptimizer):
        return
    for group in list(optimizer.param_groups):
        by_width: dict[StateBits, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            by_width.setdefault(state_bits_of(parameter.shape, group["state_bits"], ranks=ranks), []).append(parameter)
        (bits, group["params"]), *others = by_width.items()
        group.update(state_bits=bits, flattened=True)
        for bits, parameters in others:
            optimizer.add_param_group({**group, "params": parameters, "state_bits": bits})


def prepare_optimizer(ds_engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Correct DeepSpeed's own optimizers and lowmem's before their first step; others are left alone.

    Args:
        ds_engine: what `deepspeed.initialize` made of it.
    Memory: for CPULion the states, which its first step would allocate, and twice as many, otherwise.
    """
    loss_scaler: Any = getattr(ds_engine.optimizer, "loss_scaler", None)
    if hasattr(loss_scaler, "raise_error_at_min_scale"):
        loss_scaler.raise_error_at_min_scale = False  # the step is reported as skipped, and the loop decides when to give up
    kind = type(optimizer).__name__
    if kind == "DeepSpeedCPUAdam":
        _make_bias_correction_stateless(optimizer)
    elif kind == "DeepSpeedCPULion":
        _allocate_lion_states(ds_engine, optimizer)
    elif isinstance(optimizer, LowBitOptimizer):
        _draw_apart(ds_engine, optimizer)


def partitions(ds_engine: Any) -> Iterator[torch.Tensor]:
    """The flat fp32 tensors of this rank that a ZeRO stage hands to its optimizer."""
    zero = ds_engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        yield from getattr(zero, name, [])


def _make_bias_correction_stateless(optimizer: Any) -> None:
    """Have CPUAdam compute beta**step from the step alone.

    The operator multiplies a running product from step to step, and only calls pow after a jump. A resumed process starts with
    a jump, so its first bias correction could differ in the last bit from that of a process that never stopped. An update of a
    dummy at step 0 before every step makes every step a jump.
    """
    dummy = [torch.zeros(1) for _ in range(4)]

    def jump_to_zero(optimizer: Any, args: Any, options: Any) -> None:
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, beta1, beta2, group["eps"], 0.0, False, *dummy)

    optimizer.register_step_pre_hook(jump_to_zero)


def _allocate_lion_states(ds_engine: Any, optimizer: Any) -> None:
    """Give CPULion its one state; left to itself it also allocates Adam's second one and never uses it."""
    for partition in partitions(ds_engine):
        optimizer.state[partition] = {"step": 0, "exp_avg": torch.zeros_like(partition, dtype=torch.float32, requires_grad=False)}


def _draw_apart(ds_engine: Any, optimizer: LowBitOptimizer) -> None:
    """Give each partition of each rank random numbers of its own: to the optimizer every one of them is parameter 0.

    Stage 0 has no partitions: its ranks update equal weights, and must round them alike.
    """
    numbers = {partition: number for number, partition in enumerate(partitions(ds_engine))}
    if not numbers:
        return
    seed, rank = optimizer.seed, ds_engine.global_rank

    def reseed(optimizer: Any, args: Any, options: Any) -> None:
        first = next(parameter for group in optimizer.param_groups for parameter in group["params"])
        optimizer.seed = mix_key(seed, rank, numbers[first])

    optimizer.register_step_pre_hook(reseed)
