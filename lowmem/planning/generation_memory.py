"""What writing texts will need, known before the weights are read: the model's own cache and passes on tensors without memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from lowmem.models.base import LanguageModel
from lowmem.planning.allocators import CudaAllocator, HostAllocator, live_peaks, replay
from lowmem.planning.hardware import Hardware
from lowmem.planning.trace import Trace
from lowmem.system.dry_run import on_meta, pretend_device
from lowmem.system.units import format_bytes


@dataclass(frozen=True)
class GenerationMemory:
    """Memory of tensors while a model writes; a process takes what its libraries need beside it.

    Attributes:
        device: "cpu" or "cuda": where the model computes.
        batch_size: texts at once.
        context: tokens that the cache holds of each.
        weights_bytes: of the model as it is read.
        cache_bytes: of the cache.
        logits_bytes: of the larger of two passes, one over the last piece of a prompt, one over a token of every text.
        activations_bytes: what the passes take beyond.
        load_bytes: host memory while weights are read: the model is built in fp32 on the host, unless blocks are elsewhere.
        weights_at: where the blocks are; elsewhere than on the device, two of them count as weights.
    """

    device: str
    batch_size: int
    context: int
    weights_bytes: int
    cache_bytes: int
    logits_bytes: int
    activations_bytes: int
    load_bytes: int
    weights_at: str = "device"

    @property
    def writing_bytes(self) -> int:
        """Weights, cache and passes, on the device."""
        return self.weights_bytes + self.cache_bytes + self.logits_bytes + self.activations_bytes

    @property
    def ram_bytes(self) -> int:
        """Most host memory."""
        return max(self.load_bytes, self.writing_bytes if self.device == "cpu" else 0)

    @property
    def vram_bytes(self) -> int:
        """Most device memory."""
        return self.writing_bytes if self.device == "cuda" else 0

    def as_dict(self) -> dict[str, Any]:
        """What `lowmem generate --dry_run --json` prints."""
        parts = {name: getattr(self, name) for name in ("weights_bytes", "cache_bytes", "logits_bytes", "activations_bytes", "load_bytes")}
        texts = {"device": self.device, "batch_size": self.batch_size, "context": self.context}
        return {**texts, "ram_bytes": self.ram_bytes, "vram_bytes": self.vram_bytes, **parts}

    def __str__(self) -> str:
        texts = "1 text" if self.batch_size == 1 else f"{self.batch_size} texts"
        sizes = {name: getattr(self, f"{name}_bytes") for name in ("weights", "cache", "logits", "activations")}
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
        kind = "RAM" if self.device == "cpu" else "VRAM"
        return f"writing {texts} of {self.context} tokens: {format_bytes(self.writing_bytes)} of {kind} ({parts})"


def generation_memory(
    model: LanguageModel, batch_size: int, context: int, prefill: int, device: str = "cpu", weights_at: str = "device"
) -> GenerationMemory:
    """Predict the memory of writing `batch_size` texts at once.

    Args:
        model: on the meta device, with the dtypes and ranks of the weights that will be read.
        context: tokens of the longest text, its prompt included.
        prefill: most tokens of a prompt that are computed in one pass.
        device: "cpu" or "cuda".
        weights_at: "device", "host" or "disk".
    Memory: none for the model.
    """
    trace, to_logits = Trace(), cast("Callable[[torch.Tensor], torch.Tensor]", model.logits)
    with on_meta(), torch.inference_mode(False), torch.no_grad(), trace, pretend_device(device):
        with trace.phase("load"):
            trace.mark([parameter.detach() for parameter in model.parameters()], "weights")
            cache = model.new_cache(batch_size, context)
        for storage in trace.storages:
            storage.category = storage.category or "cache"
        for phase, view, time in (("prompt", cache.rows(0, 1), min(prefill, context)), ("token", cache, 1)):
            for layer in view.layers:
                layer.lengths[:] = context - time
            with trace.phase(phase):
                tokens = torch.zeros(view.lengths.shape[0], time, dtype=torch.int64)
                if model.blocks_take_caches:
                    hidden = model.embed(tokens, view.start)
                    for block, layer in zip(model.blocks[:2], view.layers, strict=False):  # nothing outlives a block: two stand for all
                        hidden = block(hidden, layer)
                    logits = to_logits(hidden)
                    del hidden
                else:
                    logits = model(tokens, cache=view)
                trace.mark([logits], "logits")
                del logits
    trace.name_storages(model.vocab_size)
    allocator, measure = (CudaAllocator(0), "reserved_bytes") if device == "cuda" else (HostAllocator(cached=False), "resident_bytes")
    peaks = replay(trace, allocator, {"peak": measure})["peak"]
    logits_bytes = max(live_peaks(trace, {"logits"}).values())
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    here_bytes, load_bytes = weights_memory(model, weights_at)
    return GenerationMemory(
        device, batch_size, context,
        weights_bytes=here_bytes,
        cache_bytes=cache.nbytes(),
        logits_bytes=logits_bytes,
        activations_bytes=max(0, peaks.peak_bytes - weights_bytes - cache.nbytes() - logits_bytes),
        load_bytes=load_bytes,
        weights_at=weights_at,
    )  # fmt: skip


def weights_memory(model: LanguageModel, weights_at: str) -> tuple[int, int]:
    """Bytes of weights on the device while a model is used, and on the host while they are read.

    Args:
        weights_at: see `generation_memory`.
    """
    total, largest = (take(parameter.nbytes for parameter in model.parameters()) for take in (sum, max))
    if weights_at == "device":
        return total, 4 * model.num_parameters() + largest
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in model.blocks]
    here = total - sum(blocks) + 2 * max(blocks)
    return here, here + max(blocks) + largest + (sum(blocks) if weights_at == "host" else 0)


def generation_refusal(model: LanguageModel, memory: GenerationMemory, hardware: Hardware, prefill: int) -> str:
    """Why the texts cannot be written with the memory there is, in one line; empty if they can.

    Args:
        model: that `memory` is of.
        hardware: what is free.
        prefill: see `generation_memory`.
    """
    if _fits(memory, hardware):
        return ""
    kind, free = ("RAM", hardware.ram_bytes) if memory.ram_bytes > hardware.ram_bytes else ("VRAM", hardware.vram_bytes)
    batch_size, where = memory.batch_size // 2, (memory.device, memory.weights_at)
    while batch_size and not _fits(generation_memory(model, batch_size, memory.context, prefill, *where), hardware):
        batch_size //= 2
    if batch_size:
        remedy = f"set --batch_size {batch_size}"
    elif _fits(generation_memory(model, 1, 1, prefill, *where), hardware):
        remedy = "set a smaller --batch_size and --max_new_tokens, or shorten the prompt"
    elif memory.weights_at != "disk" and _fits(generation_memory(model, 1, 1, prefill, memory.device, "disk"), hardware):
        remedy = "the weights alone do not fit; set --weights_at=disk, which reads them from a disk for each token"
    else:
        remedy = "the weights alone do not fit; free memory, or use a machine with more"
    loading = f"; reading the weights takes {format_bytes(memory.load_bytes)} of RAM" if memory.load_bytes >= memory.ram_bytes else ""
    return f"{memory}{loading}; {format_bytes(free)} of {kind} are free; {remedy}"


def _fits(memory: GenerationMemory, hardware: Hardware) -> bool:
    return memory.ram_bytes <= hardware.ram_bytes and memory.vram_bytes <= hardware.vram_bytes
