"""Fine-tuning so small that a test can afford many runs: its configuration, tokens and conversations."""

from pathlib import Path

import numpy as np
import torch

from lowmem.config.finetune import FinetuneConfig, finetune_problems
from lowmem.config.load import load_config
from lowmem.data.chat import pack_conversations

CPU = torch.device("cpu")
TOKENS = torch.arange(40).view(1, 40) * 7 % 300


def make_config(base: Path, chat: Path, out: Path, *more: str) -> FinetuneConfig:
    settings = {"base": base, "data": chat, "out": out, "seq_len": 64, "steps": 6, "batch_size": 2, "eval_every": 3, "save_every": 2}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_config(FinetuneConfig, "", [*overrides, "optim.warmup_steps=1", "optim.lr=0.01", "adapter.r=4", *more], finetune_problems)


def logits(model, tokens=TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def packed(rows: int = 2, seq_len: int = 40, *, one_per_row: bool = False):
    """Rows of random conversations of which the assistant says the second half."""
    random = np.random.default_rng(0)
    items = [(random.integers(1, 250, length), np.arange(length) > length // 2) for length in (9, 12, 7, 15, 30)]
    return pack_conversations(items, seq_len, one_per_row=one_per_row).batch.rows(0, rows)
