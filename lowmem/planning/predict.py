"""What a run will need, known before it starts: the real step on tensors without memory, replayed through a model of the allocator."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowmem.config.schema import RunConfig
from lowmem.engine.deepspeed.ds_config import BUCKET_ELEMENTS, build_deepspeed_config, offloads_optimizer, zero_stage
from lowmem.engine.resolve import chosen_device, resolve, settled_model
from lowmem.memory.allocator import block_cache_library
from lowmem.models.base import LanguageModel
from lowmem.nn.quantized import stored_bytes
from lowmem.optim.kernels.formats import state_bytes
from lowmem.planning.allocators import CudaAllocator, HostAllocator, Peaks, live_peaks, replay
from lowmem.planning.base_cost import Base, data_bytes, measured_base, tokenizer_rows
from lowmem.planning.disk_space import disk_components
from lowmem.planning.hardware import Rates, rates_for
from lowmem.planning.storage_rates import storage_rates_for
from lowmem.planning.trace import Trace, trace_run
from lowmem.system.errors import ConfigError
from lowmem.system.files import compiled_root
from lowmem.system.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of one steady step of the whole run.

    Attributes:
        compute: on the device.
        transfer: of blocks and boundaries that are elsewhere, from there and back.
        first: of the transfer, the weights and states of one block, which nothing hides.
        read_bytes, written_bytes: of the transfer.
        rates: how the rates of the transfer are known; "" where there is none.
    """

    compute: float
    transfer: float = 0.0
    first: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    rates: str = ""

    @property
    def total(self) -> float:
        """The longer of the two, as one thread transfers while the device computes, and the fetch before which nothing can be computed."""
        return max(self.compute, self.transfer - self.first) + self.first


def step_time(config: RunConfig, trace: Trace, model: LanguageModel, world_size: int) -> StepTime:
    """Of a run on this machine, or the one that is planned for.

    Transfers overlap with computing as far as possible: a block's with the computing of the one before it. Where parts of a step differ,
    as a forward pass that waits for the disk and a backward pass that does not, a step takes longer than this.

    Args:
        config: resolved.
        trace: of one rank's share of it.
    """
    compute, cost = trace_seconds(config, trace, model, rates_for(config), world_size), trace.costs["steady_steps"]
    if not trace.elsewhere:
        return StepTime(compute)
    rates, came, went = storage_rates_for(config), cost.storage_read_bytes, cost.storage_written_bytes
    read, written = came["disk"] / rates.disk_read, went["disk"] / rates.disk_written
    if config.device == "cuda":  # what comes from a disk goes by way of host memory, by the same thread
        read, written = read + came.total() / rates.copied, written + went.total() / rates.copied
    blocks = sum(part.of_blocks for part in trace.elsewhere) / len(model.blocks)
    first = read * min(1.0, blocks / max(1, came.total()))
    return StepTime(compute, read + written, first, came.total(), went.total(), rates.source)


def trace_seconds(config: RunConfig, trace: Trace, model: LanguageModel, rates: Rates, world_size: int = 1) -> float:
    """Seconds that a steady step computes, with rates that are given."""
    cost = trace.costs["steady_steps"]
    products = sum(flops / rates.flops_per_s(dtype) for dtype, flops in cost.matmul_flops.items())
    traffic = cost.moved_bytes / rates.bytes_per_s
    update = model.num_trained_parameters() / rates.updates_per_s(config)
    return (products + traffic + cost.calls * rates.call_s) * (world_size if config.device == "cpu" else 1) + update


CUBLAS_WORKSPACE_BYTES = 8_519_680  # PyTorch's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8; 32 MiB from Hopper on
FRAGMENTATION = 0.5  # of what passes through the heap of small blocks: small objects outlive tensors and keep them apart


@dataclass(frozen=True)
class Prediction:
    """Peaks before they happen.

    Attributes:
        config: resolved.
        parameters: numbers of the whole model.
        trained_parameters: those that are trained.
        host: resident memory of all processes of the run.
        cuda_allocated, cuda_reserved: of each device; empty without one.
        time: of a step, on this machine or the one that is planned for.
        disk: bytes on disks by what they are for: scratch, checkpoints, shards.
        base: how the cost of interpreter and libraries is known.
    """

    config: RunConfig
    parameters: int
    trained_parameters: int
    parameters_by_component: dict[str, int]
    flops_per_token: int
    host: Peaks
    cuda_allocated: Peaks
    cuda_reserved: Peaks
    time: StepTime
    disk: dict[str, int]
    base: Base

    @property
    def step_s(self) -> float:
        """Seconds a step will take."""
        return self.time.total

    @property
    def disk_bytes(self) -> int:
        """On all disks."""
        return sum(self.disk.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of the whole run."""
        return self.config.train.global_batch_size * self.config.data.seq_len / self.step_s

    def as_dict(self) -> dict[str, Any]:
        """What memory.json calls `predicted`; `components` are those of the scarcer memory: of the device, where there is one."""
        device = bool(self.cuda_reserved.by_phase)
        return {
            "host_peak_bytes": self.host.peak_bytes,
            "cuda_allocated_peak_bytes": self.cuda_allocated.peak_bytes,
            "cuda_reserved_peak_bytes": self.cuda_reserved.peak_bytes,
            "components": (self.cuda_reserved if device else self.host).components,
            "host_components": self.host.components,
            "host_phases": self.host.by_phase,
            "cuda_phases": self.cuda_reserved.by_phase,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "step": asdict(self.time) | {"total": self.step_s},
            "disk_bytes": self.disk_bytes,
            "disk_components": self.disk,
            "base_is": self.base.source,
        }

    def lines(self) -> list[str]:
        """For people."""
        trained = f", of which {self.trained_parameters:,} are trained" if self.trained_parameters != self.parameters else ""
        lines = [
            f"parameters: {self.parameters:,}{trained}",
            f"predicted peak of RAM: {described(self.host)} (base cost {self.base.source})",
        ]
        if self.cuda_reserved.by_phase:
            lines.append(f"predicted peak of VRAM, reserved: {described(self.cuda_reserved)}")
        if self.disk_bytes:
            lines.append(f"predicted use of disks: {listed_bytes(self.disk)}")
        lines.append(f"predicted speed: {self.tokens_per_s:,.{0 if self.tokens_per_s >= 10 else 2}f} tokens/s")
        if self.time.rates:
            time = self.time
            lines[-1] += (
                f", a step of {self.step_s:,.2f} s: {time.compute:,.2f} s of computing beside {time.transfer:,.2f} s in which "
                f"{format_bytes(time.read_bytes)} are read and {format_bytes(time.written_bytes)} written ({time.rates} rates)"
            )
        return lines

    def report(self) -> dict[str, Any]:
        """What `--dry_run --json` prints."""
        return {
            "config": asdict(self.config),
            "budget": asdict(self.config.budget),
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "parameters_by_component": self.parameters_by_component,
            "flops_per_token": self.flops_per_token,
            "predicted": self.as_dict(),
        }


def described(peaks: Peaks) -> str:
    """ "1.20 GiB (weights 0.40 GiB, ...)", the largest component first."""
    return listed_bytes(peaks.components, peaks.peak_bytes)


def listed_bytes(components: Mapping[str, int], total: int = 0) -> str:
    """As `described`; of their sum where no total is given."""
    ordered = sorted(components.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in ordered if size >= 1 << 20)
    return f"{format_bytes(total or sum(components.values()))}{f' ({listed})' if listed or total else ''}"


def predict_peak(config: RunConfig, world_size: int = 1, local_ranks: int = 0, base: Base | None = None) -> Prediction:
    """Peak memory of a run and the time of its steps.

    Args:
        config: checked; not changed. device=cuda works without one.
        world_size: ranks that share the global batch, under DeepSpeed.
        local_ranks: those on this machine, whose host memory is predicted; 0 is all.
        base: of a similar run, to save the time of measuring it.
    Raises:
        ConfigError: the device cannot do what is asked, or the vocabulary is not known before the text is read.
    Memory: some 400 MB of Python and PyTorch; none for the model. The base cost is measured once per kind of run, in a process of its
        own, and kept in the cache.
    """
    config = resolve_without_data(config)
    trace, model = trace_run(as_computed(config), world_size)
    local_ranks = local_ranks or world_size
    base = base or measured_base(config, local_ranks, _host_tensors)
    host, allocated, reserved = (_on_cuda if config.device == "cuda" else _on_cpu)(config, trace, model, world_size, local_ranks)
    host = host.plus("base", base.size_bytes).plus("data", data_bytes(config) * local_ranks)
    return Prediction(
        config, model.num_parameters(), model.num_trained_parameters(), model.component_parameters(),
        model.flops_per_token(config.data.seq_len), host, allocated, reserved, step_time(config, trace, model, world_size),
        disk_components(config, run_checkpoint_bytes(config, trace.checkpoint_bytes, model), trace.scratch_bytes()), base,
    )  # fmt: skip


def resolve_without_data(config: RunConfig) -> RunConfig:
    """A copy in which everything is settled that needs no text.

    Raises:
        ConfigError: see `predict_peak`.
    """
    config = settled_model(config)
    device = chosen_device(config, check=False)
    rows = 0 if config.data.add_tokens else config.model.vocab_size
    return resolve(config, device, vocab_size=rows or _vocab_size(config))


def _host_tensors(config: RunConfig, world_size: int) -> int:
    """Peak of what the tensors of a run take on the host."""
    trace, model = trace_run(as_computed(config), world_size)
    return (_on_cuda if config.device == "cuda" else _on_cpu)(config, trace, model, world_size, world_size)[0].peak_bytes


def _on_cpu(config: RunConfig, trace: Trace, model: LanguageModel, world_size: int, local_ranks: int) -> tuple[Peaks, Peaks, Peaks]:
    if config.engine.name == "deepspeed":
        return zero_peaks(config, trace, model, world_size)[0].times(local_ranks), Peaks(), Peaks()
    allocator = HostAllocator(cached=block_cache_library(compiled_root())[0] is not None)
    host = replay(trace, allocator, {"host": "resident_bytes"})["host"]
    return host.plus("workspace", round(allocator.heap_passing_bytes * FRAGMENTATION)), Peaks(), Peaks()


def _on_cuda(config: RunConfig, trace: Trace, model: LanguageModel, world_size: int, local_ranks: int) -> tuple[Peaks, Peaks, Peaks]:
    limit = parse_bytes(config.budget.vram or "0")
    offloaded = "boundaries" if config.train.boundary_offload == "cpu" else ""
    peaks = replay(trace, CudaAllocator(limit), {"allocated": "allocated_bytes", "reserved": "reserved_bytes"}, offloaded)
    allocated, reserved = (peaks[name].plus("workspace", CUBLAS_WORKSPACE_BYTES) for name in ("allocated", "reserved"))
    host = Peaks(dict.fromkeys(allocated.by_phase, 0))
    host.by_phase["load"] = _loaded_bytes(config, model)
    host.components = {"weights": host.by_phase["load"]}
    if offloaded:
        host = host.plus("activations", max(live_peaks(trace, {offloaded}, pinned_bytes).values()))
    if config.train.weights_at != "device":
        host = host.plus("elsewhere", _pinned_for_blocks(trace))
    if config.engine.name == "deepspeed":
        device, away = zero_peaks(config, trace, model, world_size)
        rounding = max(0, reserved.peak_bytes - allocated.peak_bytes)  # of the same activations, by the same allocator
        allocated, reserved = device.plus("workspace", CUBLAS_WORKSPACE_BYTES), device.plus("workspace", CUBLAS_WORKSPACE_BYTES + rounding)
        host = max(host, away, key=lambda peaks: peaks.peak_bytes).times(local_ranks)
    return host, allocated, reserved


def _loaded_bytes(config: RunConfig, model: LanguageModel) -> int:
    """Weights that are on the host before a GPU has them: all, or, where blocks live elsewhere, the largest block besides what is none:
    matrices that will live there, too, are on the device until their optimizer has them.
    """
    if config.train.weights_at == "device":
        return stored_bytes(model.parameters())
    blocks = [stored_bytes(block.parameters()) for block in model.blocks]
    return stored_bytes(model.parameters()) - sum(blocks) + max(blocks)


def _pinned_for_blocks(trace: Trace) -> int:
    """Host memory of a GPU's blocks and matrices beside them: all of them, or buffers by way of which they come from a disk."""
    blocks = [part for part in trace.elsewhere if part.holds == "blocks"]
    kept = sum(pinned_bytes(size) for part in blocks if part.place == "host" for size in part.backing.pieces if size)
    return kept + sum(pinned_bytes(size) for part in blocks if part.place == "disk" for size in part.backing.buffers.values())


def pinned_bytes(size: int) -> int:
    """What a pinned block of `size` bytes takes: PyTorch rounds up to the next power of two."""
    return 1 << max(size - 1, 1).bit_length()


def run_checkpoint_bytes(config: RunConfig, local: int, model: LanguageModel) -> int:
    """Of one checkpoint of a run, whose local engine would write `local` bytes: ZeRO keeps an fp32 master copy of narrow weights, too."""
    if config.engine.name == "local" or not zero_stage(build_deepspeed_config(config, world_size=1, micro_batch_size=1)):
        return local
    return local + (4 * model.num_trained_parameters() if config.train.precision != "fp32" else 0)


def as_computed(config: RunConfig) -> RunConfig:
    """The local engine that computes what each rank computes, at the largest rank that a schedule may reach."""
    largest = config.model.lorpt.largest_rank()
    if config.engine.name == "local" and not largest:
        return config
    config = copy.deepcopy(config)
    if largest and config.model.lorpt.rank != "auto":
        config.model.lorpt.rank = max(config.model.lorpt.rank, largest)
    if config.engine.name == "local":
        return config
    config.engine.name = "local"
    if zero_stage(build_deepspeed_config(config, world_size=1, micro_batch_size=1)) and config.train.precision != "fp32":
        # ZeRO computes with 16-bit weights beside its fp32 master copy; bf16 ones take the same room, and need no loss scale here
        config.train.precision = config.train.weight_dtype = "bf16"
    return config


def _vocab_size(config: RunConfig) -> int:
    """Rows the tokenizer will have."""
    rows = tokenizer_rows(config.data)
    if rows:
        return rows
    raise ConfigError(
        f"data.tokenizer={config.data.tokenizer} has a size that only the text or the file tells; set model.vocab_size for a dry run"
    )


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
    """What is frozen has no master copy, states or gradients; in stage 3 it is divided, too."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = sum(parameter.numel() for parameter in trained)
    share = -(-numbers // world_size)
    itemsize = _computed_itemsize(config)
    frozen = stored_bytes(parameter for parameter in model.parameters() if not parameter.requires_grad)
    bucket = BUCKET_ELEMENTS * itemsize
    pieces, bits = (world_size if stage else 1), config.optim.state_bits
    states = sum(state_bytes(parameter.shape, bits, ranks=pieces) for parameter in trained) * _STATES[config.optim.name]
    if stage == 0:
        stored = sum(parameter.numel() * (4 if config.train.weight_dtype == "fp32" else parameter.element_size()) for parameter in trained)
        flattened = stored if world_size > 1 else 0  # gradients are averaged in one flat copy
        return _Parts(stored + frozen, 0, states, stored, flattened, 0)
    summed = share * 4
    if offload:  # the share is summed in one host buffer and handed to the update in another
        summed *= 2
    if stage == 1:  # summed whole in fp32 beside the 16-bit gradients, then once more as this rank's share
        whole = numbers * (itemsize + 4) + summed
        return _Parts(numbers * itemsize + frozen, share * 4, states // world_size, whole, 2 * share * 4, bucket)
    if stage == 2:
        return _Parts(numbers * itemsize + frozen, share * 4, states // world_size, summed, share * 4, bucket)
    everything = model.num_parameters()
    small = sum(p.numel() for p in model.parameters() if p.numel() <= _PERSISTENT_ELEMENTS)
    gathered = min(_LIVE_ELEMENTS + max(p.numel() for p in model.parameters()), everything)
    held = (-(-everything // world_size) + small) * itemsize
    return _Parts(held, share * 4, states // world_size, summed, share * 4, bucket + gathered * itemsize)


def _computed_itemsize(config: RunConfig) -> int:
    return 4 if config.train.precision == "fp32" else 2
