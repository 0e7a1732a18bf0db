"""What DeepSpeed's ZeRO makes of the memory of a rank, by arithmetic.

DeepSpeed cannot run on tensors without memory, so its part is written down here: what each stage partitions, its fp32 master copy, its
buffers. Activations are those of the local engine's trace. `profiling/bench_predict.py` checks the sum against measured ranks.

Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 5; DeepSpeed 0.19, runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py.
"""

from dataclasses import dataclass

from lowmem.config import RunConfig
from lowmem.engine.deepspeed_config import BUCKET_ELEMENTS, build_deepspeed_config, offloads_optimizer, zero_stage
from lowmem.models.base import LanguageModel
from lowmem.optim.kernels.formats import state_bytes
from lowmem.planning.replay import Peaks, live_peaks
from lowmem.planning.trace import Trace

_STATES = {"adamw": 2, "lion": 1}
_DYNAMIC = {"activations", "boundaries", "logits", "workspace"}
_PERSISTENT_ELEMENTS = 10_000  # stage 3 keeps smaller parameters whole: stage3_param_persistence_threshold
_LIVE_ELEMENTS = 4 * BUCKET_ELEMENTS  # stage 3 gathers so many ahead: stage3_max_live_parameters


@dataclass(frozen=True)
class _Parts:
    """Bytes of one rank by component; `host` is what offload keeps in host memory."""

    weights: int
    master: int
    states: int
    gradients: int
    update: int  # what the update itself needs on top
    buffers: int


def zero_peaks(config: RunConfig, trace: Trace, model: LanguageModel, world_size: int) -> tuple[Peaks, Peaks]:
    """Peaks of one rank: what is where the model computes, and what offload keeps in host memory.

    Args:
        config: resolved, with engine.name=deepspeed.
        trace: of this rank's share of the batch, by the local engine.
        world_size: ranks.
    """
    document = build_deepspeed_config(config, world_size=world_size, micro_batch_size=1)
    stage, offload = zero_stage(document), offloads_optimizer(document)
    parts = _parts(config, model, world_size, stage, offload)
    dynamic = live_peaks(trace, _DYNAMIC)
    largest = max(parameter.numel() for parameter in model.parameters()) * _computed_itemsize(config)
    transient = largest if stage >= 2 else 0
    here = parts.weights + parts.buffers + transient
    away = parts.master + parts.states + parts.gradients
    step = max(dynamic.get("steady_steps", 0), parts.update)
    components = {
        "weights": parts.weights + parts.master,
        "optimizer_states": parts.states,
        "gradients": parts.gradients + transient,
        "activations": step,
        "workspace": parts.buffers,
    }
    phases = {"load": here + away - parts.gradients + parts.weights, "first_step": here + away + step, "steady_steps": here + away + step}
    after = step if config.device == "cpu" else 0  # the blocks of a step are kept
    phases |= {"evaluation": here + away + max(dynamic.get("evaluation", 0), after), "save": here + away + after}
    whole = Peaks(phases, components)
    if not offload or config.device == "cpu":
        return whole, Peaks()
    there = Peaks(dict.fromkeys(phases, away), {"weights": parts.master, "optimizer_states": parts.states, "gradients": parts.gradients})
    left = {"weights": parts.weights, "gradients": transient, "activations": step, "workspace": parts.buffers}
    return Peaks({name: size - away for name, size in phases.items()}, left), there


def _parts(config: RunConfig, model: LanguageModel, world_size: int, stage: int, offload: bool) -> _Parts:
    numbers = model.num_parameters()
    share = -(-numbers // world_size)
    itemsize = _computed_itemsize(config)
    bucket = BUCKET_ELEMENTS * itemsize
    pieces, bits = (world_size if stage else 1), config.optim.state_bits
    states = sum(state_bytes(parameter.shape, bits, ranks=pieces) for parameter in model.parameters()) * _STATES[config.optim.name]
    if stage == 0:
        stored = 4 if config.train.weight_dtype == "fp32" else 2
        flattened = numbers * stored if world_size > 1 else 0  # gradients are averaged in one flat copy
        return _Parts(numbers * stored, 0, states, numbers * stored, flattened, 0)
    summed = share * 4
    if offload:  # the share is summed in one host buffer and handed to the update in another
        summed *= 2
    if stage == 1:  # summed whole in fp32 beside the 16-bit gradients, then once more as this rank's share
        whole = numbers * (itemsize + 4) + summed
        return _Parts(numbers * itemsize, share * 4, states // world_size, whole, 2 * share * 4, bucket)
    if stage == 2:
        return _Parts(numbers * itemsize, share * 4, states // world_size, summed, share * 4, bucket)
    small = sum(p.numel() for p in model.parameters() if p.numel() <= _PERSISTENT_ELEMENTS)
    gathered = min(_LIVE_ELEMENTS + max(p.numel() for p in model.parameters()), numbers)
    return _Parts((share + small) * itemsize, share * 4, states // world_size, summed, share * 4, bucket + gathered * itemsize)


def _computed_itemsize(config: RunConfig) -> int:
    return 4 if config.train.precision == "fp32" else 2
