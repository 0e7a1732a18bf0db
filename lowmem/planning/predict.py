"""What a run will need, known before it starts: the real step on tensors without memory, replayed through a model of the allocator."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

from lowmem.config import RunConfig
from lowmem.data.storage import compiled_root
from lowmem.devices import cuda_problem, resolve_precision
from lowmem.engine.build import chosen_device, keeps_documents_apart
from lowmem.engine.deepspeed_config import build_deepspeed_config, zero_stage
from lowmem.errors import ConfigError
from lowmem.memory.block_cache import block_cache_library
from lowmem.models.base import LanguageModel
from lowmem.nn.quantized import stored_bytes
from lowmem.planning.base_cost import Base, data_bytes, measured_base, tokenizer_rows
from lowmem.planning.cuda_allocator import CudaAllocator
from lowmem.planning.host_allocator import HostAllocator
from lowmem.planning.replay import Peaks, live_peaks, replay
from lowmem.planning.speed import step_seconds
from lowmem.planning.step import trace_run
from lowmem.planning.trace import Trace
from lowmem.planning.zero import zero_peaks
from lowmem.units import format_bytes, parse_bytes

CUBLAS_WORKSPACE_BYTES = 8_519_680  # PyTorch's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8; 32 MiB from Hopper on
FRAGMENTATION = 0.5  # of what passes through the heap of small blocks: small objects outlive tensors and keep them apart


@dataclass(frozen=True)
class Prediction:
    """Peaks before they happen.

    Attributes:
        config: resolved.
        parameters: trainable numbers of the whole model.
        host: resident memory of all processes of the run.
        cuda_allocated, cuda_reserved: of each device; empty without one.
        step_s: seconds a step will take on this machine.
        base: how the cost of interpreter and libraries is known.
    """

    config: RunConfig
    parameters: int
    parameters_by_component: dict[str, int]
    flops_per_token: int
    host: Peaks
    cuda_allocated: Peaks
    cuda_reserved: Peaks
    step_s: float
    base: Base

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
            "base_is": self.base.source,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"parameters: {self.parameters:,}", f"predicted peak of RAM: {described(self.host)} (base cost {self.base.source})"]
        if self.cuda_reserved.by_phase:
            lines.append(f"predicted peak of VRAM, reserved: {described(self.cuda_reserved)}")
        lines.append(f"predicted speed: {self.tokens_per_s:,.0f} tokens/s")
        return lines

    def report(self) -> dict[str, Any]:
        """What `--dry_run --json` prints."""
        return {
            "config": asdict(self.config),
            "budget": asdict(self.config.budget),
            "parameters": self.parameters,
            "parameters_by_component": self.parameters_by_component,
            "flops_per_token": self.flops_per_token,
            "predicted": self.as_dict(),
        }


def described(peaks: Peaks) -> str:
    """ "1.20 GiB (weights 0.40 GiB, ...)", the largest component first."""
    ordered = sorted(peaks.components.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in ordered if size >= 1 << 20)
    return f"{format_bytes(peaks.peak_bytes)} ({listed})"


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
    trace, model = trace_run(_as_computed(config), world_size)
    local_ranks = local_ranks or world_size
    base = base or measured_base(config, local_ranks, _host_tensors)
    host, allocated, reserved = (_on_cuda if config.device == "cuda" else _on_cpu)(config, trace, model, world_size, local_ranks)
    host = host.plus("base", base.size_bytes).plus("data", data_bytes(config) * local_ranks)
    return Prediction(
        config, model.num_parameters(), model.component_parameters(), model.flops_per_token(config.data.seq_len),
        host, allocated, reserved, step_seconds(config, trace, model, world_size), base,
    )  # fmt: skip


def resolve_without_data(config: RunConfig) -> RunConfig:
    """A copy in which everything is settled that needs no text.

    Raises:
        ConfigError: see `predict_peak`.
    """
    config = copy.deepcopy(config)
    device = chosen_device(config, check=False)
    if config.train.precision == "auto":
        known = device.type == "cpu" or not cuda_problem()
        config.train.precision = resolve_precision("auto", device) if known else _cuda_precision(config)
    config.device = device.type  # type: ignore[assignment]
    config.data.document_mask = keeps_documents_apart(config, device)
    config.model.vocab_size = config.model.vocab_size or _vocab_size(config)
    config.model.max_seq_len = config.max_seq_len()
    return config


def _host_tensors(config: RunConfig, world_size: int) -> int:
    """Peak of what the tensors of a run take on the host."""
    trace, model = trace_run(_as_computed(config), world_size)
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
    host.by_phase["load"] = stored_bytes(model.parameters())
    host.components = {"weights": host.by_phase["load"]}
    if offloaded:
        host = host.plus("activations", max(live_peaks(trace, {offloaded}, pinned_bytes).values()))
    if config.engine.name == "deepspeed":
        device, away = zero_peaks(config, trace, model, world_size)
        rounding = max(0, reserved.peak_bytes - allocated.peak_bytes)  # of the same activations, by the same allocator
        allocated, reserved = device.plus("workspace", CUBLAS_WORKSPACE_BYTES), device.plus("workspace", CUBLAS_WORKSPACE_BYTES + rounding)
        host = max(host, away, key=lambda peaks: peaks.peak_bytes).times(local_ranks)
    return host, allocated, reserved


def pinned_bytes(size: int) -> int:
    """What a pinned block of `size` bytes takes: PyTorch rounds up to the next power of two."""
    return 1 << max(size - 1, 1).bit_length()


def _as_computed(config: RunConfig) -> RunConfig:
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


def _cuda_precision(config: RunConfig) -> Any:
    return config.train.weight_dtype if config.train.weight_dtype != "fp32" else "bf16"


def _vocab_size(config: RunConfig) -> int:
    """Rows the tokenizer will have."""
    rows = tokenizer_rows(config.data)
    if rows:
        return rows
    raise ConfigError(
        f"data.tokenizer={config.data.tokenizer} has a size that only the text or the file tells; set model.vocab_size for a dry run"
    )
