"""One optimizer step of fine-tuning on tensors without memory, and what an allocator makes of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lowmem.config.finetune import FinetuneConfig, micro_batch_sizes
from lowmem.data.batch import longest_batch
from lowmem.finetune.methods import one_per_row, parameter_groups
from lowmem.finetune.step import Stepper
from lowmem.memory.allocator import block_cache_library
from lowmem.planning.allocators import CudaAllocator, HostAllocator, replay
from lowmem.planning.predict import FRAGMENTATION
from lowmem.planning.trace import Trace
from lowmem.system.dry_run import pretend_device
from lowmem.system.files import compiled_root


def step_peaks(model: Any, config: FinetuneConfig, device: str) -> dict[str, int]:
    """Bytes beside the weights when steps take most: gradients, optimizer_states, activations, logits, workspace.

    Args:
        model: on the meta device, with its adapter.
        device: "cpu" or "cuda".
    Memory: none for the model.
    """
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit" and not hasattr(layer, "base_layer"):
            layer.forward = MethodType(_dequantised_product, layer)
    trace, meta = Trace(), torch.device("meta")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: trace.mark([parameter.grad], "gradients"))
    batch = longest_batch(config.batch_size, config.seq_len, packed=True).rows(0, 2 * micro_batch_sizes(config)[0])
    assert batch.segments is not None
    batch.segments[:, config.seq_len // 2 :] = 1 if one_per_row(model, config) else 2
    with meta, trace, pretend_device(device), _fused_attention():
        with trace.phase("load"):
            held = [parameter.detach() for parameter in model.parameters() if type(parameter).__name__ != "Params4bit"]
            trace.mark(held, "weights")
        with trace.phase("first_step"):
            stepper = Stepper(model, parameter_groups(model, config), config, meta)
            stepper.step(batch, config.optim.lr)
            states = (value for state in stepper.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor))
            trace.mark(states, "optimizer_states")
        with trace.phase("steady_steps"):
            stepper.step(batch, config.optim.lr)
    trace.name_storages(model.config.vocab_size)
    if device == "cuda":
        peaks = replay(trace, CudaAllocator(0), {"peak": "reserved_bytes"})["peak"]
    else:
        allocator = HostAllocator(cached=block_cache_library(compiled_root())[0] is not None)
        peaks = replay(trace, allocator, {"peak": "resident_bytes"})["peak"]
        peaks = peaks.plus("workspace", round(allocator.heap_passing_bytes * FRAGMENTATION))
    return {name: peaks.components.get(name, 0) for name in ("gradients", "optimizer_states", "activations", "logits", "workspace")}


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as a CPU and a GPU compute it, in one kernel that keeps no scores; on the meta device PyTorch would take another one."""
    usual, kernel = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def fused(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
        if enable_gqa:
            k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        return kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = usual


def _dequantised_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What a 4-bit layer allocates: its weight in full while it is multiplied, in the forward and again in the backward pass."""
    return _Product.apply(x, layer.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out_features):  # type: ignore[no-untyped-def]
        ctx.width = x.shape[-1]
        return x @ x.new_empty(out_features, ctx.width).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad @ grad.new_empty(grad.shape[-1], ctx.width), None
