"""What a fine-tuning run will need, by arithmetic on the model without weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem.config_finetune import FinetuneConfig
from lowmem.finetune.base_model import NF4_BLOCK, NF4_SCALE_BLOCK, _empty, _make_nf4
from lowmem.finetune.methods import apply_method, blocks_of
from lowmem.memory.measure import host_rss_bytes
from lowmem.units import format_bytes

_STATES = {"adamw": 2, "lion": 1}


@dataclass(frozen=True)
class FinetuneMemory:
    """Bytes by component.

    Attributes:
        components: libraries (this process now), base, adapter, gradients, optimizer_states, activations, logits.
        trainable, total: numbers.
    """

    components: dict[str, int]
    trainable: int
    total: int

    @property
    def peak_bytes(self) -> int:
        """Their sum."""
        return sum(self.components.values())

    def line(self) -> str:
        """For people."""
        parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in self.components.items() if size)
        return f"predicted peak of RAM: {format_bytes(self.peak_bytes)} ({parts}); {self.trainable:,} of {self.total:,} numbers are trained"


def predict_memory(config: FinetuneConfig, directory: Path) -> FinetuneMemory:
    """Peak memory on a CPU, the libraries that are imported by now included.

    Activations are an estimate: with gradient_checkpointing the inputs of all blocks and one block in full; else all blocks.

    Memory: none for the model.
    """
    model = _empty(directory)
    shape = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.method == "qlora":
        _make_nf4(model, config.adapter.double_quant)
    base = weight_bytes(model, config.adapter.double_quant)
    width, layers, vocab = shape.hidden_size, len(blocks_of(model)), shape.vocab_size
    hidden = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * width
    model.is_loaded_in_4bit = False
    with torch.device("meta"):
        adapted: Any = apply_method(model, config, [])
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    separate = config.method not in ("head", "last_k", "full")
    tokens = config.micro_batch_size * config.seq_len
    block = 4 * (tokens * (10 * width + 4 * hidden) + 3 * config.micro_batch_size * shape.num_attention_heads * config.seq_len**2)
    kept = 4 * tokens * width * layers
    bits = config.optim.state_bits
    return FinetuneMemory(
        {
            "libraries": host_rss_bytes(),
            "base": base,
            "adapter": 4 * trainable if separate else 0,
            "gradients": 4 * trainable if config.update == "accumulate" else 4 * max((p.numel() for p in adapted.parameters()), default=0),
            "optimizer_states": trainable * _STATES[config.optim.name] * bits // 8,
            "activations": kept + block if config.gradient_checkpointing else block * layers,
            "logits": 4 * 3 * tokens * vocab,
        },
        trainable,
        total + (trainable if separate else 0),
    )


def weight_bytes(model: Any, double_quant: bool) -> int:
    """Bytes of the weights as they are kept: fp32, or NF4 with its scales.

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
            total += 4 * parameter.numel()
    return round(total)
