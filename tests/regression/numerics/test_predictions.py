"""Predictions of memory: what a step imports, and what they count.

Every test here failed before the fault that it names was mended.
"""

import subprocess
import sys

STEP_WITH_BLOCK_RECOMPUTATION = """
import sys
import torch
from lowmem.config import ModelConfig
from lowmem.models.registry import build_model
model = build_model(ModelConfig(dim=32, num_layers=2, num_heads=2), vocab_size=50, max_seq_len=8, seed=0)
model.activation_checkpointing = "block"
tokens = torch.zeros(1, 8, dtype=torch.int64)
hidden = model.embed(tokens)
for index in range(2):
    from lowmem.nn.recompute import run_block
    hidden = run_block(model.blocks[index], hidden, "block")
hidden.sum().backward()
assert all(parameter.grad is not None for parameter in model.blocks.parameters())
print(sorted({name.split(".")[1] for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))}))
"""


def test_recomputing_a_block_does_not_import_the_compiler():
    """It cost 140 MB during the first step, of which the prediction knew nothing."""
    result = subprocess.run([sys.executable, "-c", STEP_WITH_BLOCK_RECOMPUTATION], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
