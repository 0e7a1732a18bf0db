"""One run of the engine without memory: building, two steps, an evaluation, each recorded by a `Trace`."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from lowmem.config import RunConfig, resolve_micro_batch_size
from lowmem.data.batch import longest_batch
from lowmem.engine.build import build_configured_model, build_local_engine
from lowmem.engine.local import LocalEngine
from lowmem.engine.teacher import teacher_config
from lowmem.errors import ConfigError
from lowmem.fake import listen, pretend_device
from lowmem.models.base import LanguageModel
from lowmem.optim.low_bit import LowBitOptimizer
from lowmem.planning.trace import Trace

EVALUATION_BATCH = 16  # windows at once, as `lowmem.data.validation` yields them


def trace_run(config: RunConfig, world_size: int = 1) -> tuple[Trace, LanguageModel]:
    """Drive the engine that `config` asks for through everything a run does, on tensors without storage.

    Args:
        config: resolved, for one process: under DeepSpeed the engine that computes the same model without partitions.
        world_size: ranks that share the global batch.
    Returns:
        The trace, with phases load, first_step, steady_steps and evaluation; the model, on the meta device.
    Raises:
        ConfigError: the global batch does not split evenly.
    Memory: none for the model.
    """
    try:
        resolve_micro_batch_size(config, world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config = _for_one_rank(config, world_size)
    trace, meta = Trace(), torch.device("meta")
    micro_batch_size = resolve_micro_batch_size(config, 1)
    precision = config.train.precision
    assert precision != "auto"
    if precision == "fp8":
        precision = "bf16"  # what it keeps in memory; fp8 copies are smaller and live as long as one product
    with meta, trace, pretend_device(config.device), listen(trace.mark):
        with trace.phase("load"):
            model = build_configured_model(config)
            teacher = _teacher(config)
            engine = build_local_engine(config, model, meta, precision, micro_batch_size, teacher)
        trace.mark(model.parameters(), "weights")
        if teacher is not None:
            trace.mark(teacher.parameters(), "teacher")
        _mark_gradients(trace, model, engine)
        trace.mark(_optimizer_tensors(engine), "optimizer_states")
        kinds = sorted({phase.kind for phase in config.all_phases()}, reverse=True)
        mask, sequences = config.data.document_mask is True, config.train.global_batch_size
        batches = [longest_batch(sequences, config.data.seq_len, packed=mask or kind == "chat") for kind in kinds]
        for phase in ("first_step", "steady_steps"):
            with trace.phase(phase):
                for batch in batches:
                    engine.step(batch, config.optim.lr)
        if config.train.eval_every:
            with trace.phase("evaluation"):
                sequences = min(EVALUATION_BATCH, config.train.eval_sequences or EVALUATION_BATCH)
                engine.evaluate([longest_batch(sequences, config.data.seq_len, packed=mask)])
        with trace.phase("save"):  # tensors are written from where they are
            del batch, batches
    trace.name_storages(model.vocab_size)
    return trace, model


def _for_one_rank(config: RunConfig, world_size: int) -> RunConfig:
    config = copy.deepcopy(config)
    config.train.global_batch_size //= world_size
    config.train.boundary_offload = "none"  # no streams here; whose memory they are is for the caller to say
    if config.optim.backend == "bitsandbytes":
        config.optim.backend = "lowmem"  # states of the same size, and bitsandbytes has no kernels without numbers
    return config


def _teacher(config: RunConfig) -> LanguageModel | None:
    distill = config.train.distill
    if not distill.teacher:
        return None
    return build_configured_model(teacher_config(distill, vocab_size=config.model.vocab_size, seq_len=config.data.seq_len))


def _mark_gradients(trace: Trace, model: LanguageModel, engine: LocalEngine) -> None:
    """Have the trace told of what autograd leaves in .grad, and of what a layerwise step hands to its optimizer."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: trace.mark([parameter.grad], "gradients"))
    optimizer = engine.optimizer
    if isinstance(optimizer, LowBitOptimizer):
        update = optimizer.update

        def marked(parameter: torch.Tensor, grad: torch.Tensor, **more: Any) -> None:
            trace.mark([grad], "gradients")
            update(parameter, grad, **more)

        optimizer.update = marked  # type: ignore[method-assign]


def _optimizer_tensors(engine: LocalEngine) -> Iterable[torch.Tensor]:
    return (value for state in engine.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
