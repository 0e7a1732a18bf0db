"""What a fine-tuning run will need: one step on tensors without memory, and the weights by arithmetic."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowmem.config.finetune import FinetuneConfig
from lowmem.finetune.base_model import DTYPES, NF4_BLOCK, NF4_SCALE_BLOCK, compute_device, empty_model, enable_checkpointing, make_nf4
from lowmem.finetune.dry_run import step_peaks
from lowmem.finetune.methods import WITHOUT_ADAPTER, apply_method, can_checkpoint
from lowmem.memory.measure import host_rss_bytes
from lowmem.planning.base_cost import CUDA_HOST_BYTES
from lowmem.planning.predict import CUBLAS_WORKSPACE_BYTES
from lowmem.system.units import format_bytes, parse_bytes

FIRST_USE_BYTES = 22 << 20  # code that a first step, a first batch and a first file load beside what is imported by then; measured


@dataclass(frozen=True)
class FinetuneMemory:
    """Bytes by component.

    Attributes:
        components: of RAM: libraries (this process now, and what its first step loads), base, adapter, gradients, optimizer_states,
            activations, logits, workspace.
        vram: the same of a GPU; empty without one. The weights and the steps are there then.
        trainable, total: numbers.
    """

    components: dict[str, int]
    vram: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0

    @property
    def peak_bytes(self) -> int:
        """Of RAM."""
        return sum(self.components.values())

    def line(self) -> str:
        """For people."""
        lines = [f"predicted peak of RAM: {_described(self.components)}"]
        lines += [f"of VRAM, reserved: {_described(self.vram)}"] if self.vram else []
        return f"{'; '.join(lines)}; {self.trainable:,} of {self.total:,} numbers are trained"

    def missing(self, config: FinetuneConfig) -> str:
        """What exceeds its budget, for people; empty if nothing does."""
        parts = []
        for name, components in (("ram", self.components), ("vram", self.vram)):
            budget = getattr(config.budget, name)
            if budget and sum(components.values()) > parse_bytes(budget):
                parts.append(f"{format_bytes(sum(components.values()))} of {name.upper()}, budget.{name} is {budget}")
        return " and ".join(parts)


def predict_memory(config: FinetuneConfig, directory: Path) -> FinetuneMemory:
    """Peak memory of a run, the libraries that are imported by now included.

    Args:
        config: with micro_batch_size=auto the largest that is allowed counts; see `lowmem.finetune.settle`.
    Memory: none for the model.
    """
    dtype, device = DTYPES[config.base_dtype], compute_device().type
    model = empty_model(directory, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    if config.method == "qlora":
        make_nf4(model, config.adapter.double_quant, dtype)
    base = weight_bytes(model, config.adapter.double_quant)
    with torch.device("meta"):
        if config.add_tokens:
            model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + len(config.add_tokens), mean_resizing=False)
        rows = model.get_input_embeddings().weight.shape[0]
        adapted: Any = apply_method(model, config, list(range(rows - len(config.add_tokens), rows)))
    if config.gradient_checkpointing and can_checkpoint(config):
        enable_checkpointing(model)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    separate = config.method not in WITHOUT_ADAPTER
    weights = {"base": base, "adapter": sum(p.numel() * p.element_size() for p in trained) if separate else 0}
    tensors = {**weights, **step_peaks(adapted, config, device)}
    host, libraries = dict.fromkeys(tensors, 0), host_rss_bytes() + FIRST_USE_BYTES
    if device == "cpu":
        host = tensors
    else:
        libraries += CUDA_HOST_BYTES
        host["base"] = 4 * max(parameter.numel() for parameter in adapted.parameters())  # one tensor on its way
        tensors["workspace"] += CUBLAS_WORKSPACE_BYTES
    total = count + (trainable if separate else 0)
    return FinetuneMemory({"libraries": libraries, **host}, tensors if device != "cpu" else {}, trainable, total)


def _described(components: dict[str, int]) -> str:
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in Counter(components).most_common() if size)
    return f"{format_bytes(sum(components.values()))} ({parts})"


def weight_bytes(model: Any, double_quant: bool) -> int:
    """Bytes of the weights as they are kept: in their dtype, or NF4 with its scales.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3: 0.5 bytes a number, an fp32 scale for 64 of them, which double quantisation
    keeps in 8 bits with one more fp32 scale for 256.
    """
    quantised = {id(layer.weight) for layer in model.modules() if type(layer).__name__ == "Linear4bit"}
    total = 0.0
    for parameter in model.parameters():
        if id(parameter) in quantised:
            scales = parameter.numel() / NF4_BLOCK
            total += parameter.numel() / 2 + (scales * (1 + 4 / NF4_SCALE_BLOCK) if double_quant else scales * 4)
        else:
            total += parameter.numel() * parameter.element_size()
    return round(total)
