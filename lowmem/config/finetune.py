"""The configuration of `lowmem finetune`. Imports no torch; the names of a method's settings are PEFT's."""

from dataclasses import dataclass, field
from typing import Literal

from lowmem.config.schema import BudgetConfig, OptimConfig, auto_micro_batch_sizes, state_width_problems

Method = Literal["lora", "qlora", "dora", "lora_plus", "rslora", "prefix", "ia3", "head", "last_k", "full"]


@dataclass
class AdapterConfig:
    """What is trained besides or instead of the base's weights."""

    r: int = 8
    """Rank of LoRA and its kin."""
    lora_alpha: float = 16.0
    """Scale: the adapter counts alpha / r, with rslora alpha / sqrt(r)."""
    lora_dropout: float = 0.0
    """Dropout on what enters the adapter."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the layers that get an adapter; empty is every linear layer but the head."""
    loraplus_lr_ratio: float = 16.0
    """lora_plus only: the learning rate of B is so many times that of A; at least 1."""
    num_virtual_tokens: int = 16
    """prefix only: trained keys and values before the text."""
    last_k: int = 1
    """last_k only: blocks that are trained, counted from the end, with the final norm."""
    double_quant: bool = True
    """qlora only: keep the scales of the 4-bit base in 8 bits, too."""


@dataclass
class FinetuneConfig:
    """Everything that determines a fine-tuning run."""

    base: str = ""
    """Run directory of lowmem, or a directory of a causal language model of transformers."""
    base_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the base is kept and computed in, where it is not 4-bit; bf16 halves it. Adapters stay fp32; parts of the base that are trained
    in bf16 are rounded stochastically."""
    data: str = ""
    """Chat records: .json .jsonl .txt .parquet in the usual shapes."""
    method: Method = "lora"
    """lora, qlora (base in 4-bit NF4), dora, lora_plus, rslora, prefix, ia3; or without adapter: head, last_k, full."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Settings of the method."""
    template: str = ""
    """Jinja file; empty takes the base's own, else lowmem's."""
    add_tokens: list[str] = field(default_factory=list)
    """New tokens. Their rows begin at the mean of the old ones, are trained, and are saved with the adapter."""
    seq_len: int = 256
    """Longest conversation; longer ones are cut and counted."""
    truncation: Literal["cut", "drop"] = "cut"
    """Cut long conversations, or leave them out."""
    val_fraction: float = 0.05
    """Share of the conversations held out."""
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 8
    """Rows per step; conversations are packed into rows."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Rows computed at once; divides batch_size. auto: at most 4096 tokens, and no more than is predicted to fit the budget; with
    update=layerwise batch_size. Lowered when memory runs out."""
    update: Literal["accumulate", "layerwise"] = "accumulate"
    """layerwise: each gradient is applied and freed as soon as it is there; needs all rows of a step at once, clips by the last norm."""
    gradient_checkpointing: bool = True
    """Keep each block's input only and compute the block again."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.0, warmup_steps=10, betas=(0.9, 0.999)))
    """Optimizer and schedule; narrow states work here, too."""
    eval_every: int = 50
    """Steps between evaluations on the held-out conversations; 0 never."""
    save_every: int = 50
    """Steps between checkpoints; 0 only at the end."""
    seed: int = 0
    """Of the adapter and of the order of the data."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Memory limits."""
    out: str = "runs/finetuned"
    """Folder: base/ for a lowmem run, adapter/, merged/, metrics.jsonl. The same command goes on where it was."""


def micro_batch_sizes(config: FinetuneConfig) -> list[int]:
    """Sizes to choose from, the largest first; one unless micro_batch_size is auto."""
    if config.micro_batch_size != "auto":
        return [config.micro_batch_size]
    return [config.batch_size] if config.update == "layerwise" else auto_micro_batch_sizes(config.batch_size, config.seq_len)


def memory_remedies(config: FinetuneConfig) -> list[str]:
    """Settings beside the sizes that are not in force and would take less memory, the most effective first."""
    remedies = [] if config.method == "qlora" else ["method=qlora"]
    remedies += [] if config.gradient_checkpointing else ["gradient_checkpointing=true"]
    return remedies


def finetune_problems(config: FinetuneConfig) -> list[str]:
    """Contradictions, one line each."""
    optim = config.optim
    problems = [f"{name} is empty; name it" for name in ("base", "data", "out") if not getattr(config, name)]
    micro = config.micro_batch_size
    if micro != "auto" and micro > 0 and config.batch_size % micro:
        problems.append(f"micro_batch_size is {micro}, which does not divide batch_size ({config.batch_size})")
    if config.update == "layerwise" and micro not in ("auto", config.batch_size):
        problems.append("update=layerwise applies gradients as they come: leave micro_batch_size=auto, or use update=accumulate")
    if optim.name == "spectron" or optim.backend != "lowmem":
        problems.append("optim.name must be adamw or lion and optim.backend lowmem here")
    problems += state_width_problems(optim)
    if optim.clip_by != "auto":
        problems.append(f"optim.clip_by is {optim.clip_by}, must be auto here: global, and with update=layerwise previous")
    if config.add_tokens and config.method in ("prefix", "ia3", "head", "last_k"):
        problems.append(f"add_tokens needs a method that trains rows: lora and its kin, or full; found {config.method}")
    return problems
