"""Engines of every kind, small enough to run out of memory at any operation of a step, and their batches."""

from typing import Any

import numpy as np
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.models.base import LossOptions
from lowmem.models.registry import build_model

VOCAB, SEQ_LEN, GLOBAL_BATCH, MICRO, LR, STEPS = 67, 16, 12, 6, 1e-2, 3
CPU = torch.device("cpu")
DENSE = ModelConfig(dim=32, num_layers=2, num_heads=2)
TIED = ModelConfig(dim=32, num_layers=2, num_heads=2, tie_embeddings=True, positions="alibi")
LORPT = ModelConfig(
    dim=32, num_layers=2, num_heads=2, positions="learned", lorpt=LorptConfig(rank=4, targets=["attention", "mlp", "head"])
)  # fmt: skip
I3 = ModelConfig(name="i3", dim=32, num_layers=2, num_heads=1, attention_rank=4, lorpt=LorptConfig(rank=4))
# model, update, activation checkpointing, optimizer, tokens of a chunk of the loss (32 makes a layerwise engine update its head in rows)
CASES: dict[str, tuple[ModelConfig, str, str, dict[str, Any], int]] = {
    "dense": (DENSE, "accumulate", "none", {}, 0),
    "lorpt": (LORPT, "accumulate", "block", {"state_bits": 8}, 32),
    "tied": (TIED, "accumulate", "selective", {"name": "lion", "lr": 1e-3, "state_bits": 8}, 0),
    "i3": (I3, "accumulate", "block", {}, 0),
    "dense, layerwise": (DENSE, "layerwise", "none", {}, 0),
    "dense in rows, layerwise": (DENSE, "layerwise", "block", {"state_bits": 8}, 32),
    "i3 in rows, layerwise": (I3, "layerwise", "selective", {}, 32),
    "lorpt, layerwise": (LORPT, "layerwise", "block", {"state_bits": 4}, 0),
    "tied, layerwise": (TIED, "layerwise", "selective", {"name": "lion", "lr": 1e-3}, 0),
    "i3, layerwise": (I3, "layerwise", "block", {"clip_by": "block"}, 0),
}


def make_engine(case: str, micro: int = MICRO, **optim: Any) -> LocalEngine:
    """Always the same initial weights."""
    shape, update, checkpointing, settings, chunk_tokens = CASES[case]
    model = build_model(shape, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0)
    model.activation_checkpointing, model.loss_options = checkpointing, LossOptions(chunk_tokens=chunk_tokens)
    config = OptimConfig(**{"lr": LR, "clip": 0.5, **settings, **optim})
    common = {"device": CPU, "precision": "fp32", "micro_batch_size": micro}
    if update == "layerwise":
        return LayerwiseEngine(model, config, TrainConfig(update="layerwise"), **common)
    return LocalEngine(model, config, **common)


def make_batch(seed: int) -> Batch:
    """Rows with different numbers of predicted tokens, so that a lost or doubled micro-batch shows."""
    batch = Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1)))
    targets = batch.targets.copy()
    for row in range(GLOBAL_BATCH):
        targets[row, : 2 * row % SEQ_LEN] = IGNORE_INDEX
    return Batch(batch.inputs, targets)
