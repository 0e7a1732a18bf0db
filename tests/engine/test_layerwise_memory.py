"""Measured in fresh processes: the gradients of a layerwise step take one block, not the model."""

import json
import subprocess
import sys

import pytest

from tests.train.tiny_run import ROOT

pytestmark = pytest.mark.memory

# Few tokens and a small vocabulary, so that weights, states and gradients are nearly all there is; 10 blocks of 3.15M numbers.
SCRIPT = """
import json, sys
import numpy as np, torch
from lowmem.config.schema import ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.memory.allocator import set_up_host_memory
from lowmem.memory.measure import measure_peak
from lowmem.models.registry import build_model
from lowmem.system.files import compiled_root

torch.set_num_threads(1)
set_up_host_memory(compiled_root())  # as a run does: glibc's own thresholds depend on what was freed before
model = build_model(ModelConfig(dim=512, num_layers=10, num_heads=8), vocab_size=128, max_seq_len=8, seed=0)
model.activation_checkpointing = "block"
optim, settings = OptimConfig(state_bits=4), {"device": torch.device("cpu"), "precision": "fp32", "micro_batch_size": 2}
if sys.argv[1] == "layerwise":
    engine = LayerwiseEngine(model, optim, TrainConfig(update="layerwise"), **settings)
else:
    engine = LocalEngine(model, optim, **settings)
batch = Batch.from_windows(np.random.default_rng(0).integers(0, 128, (4, 9)))
for _ in range(3):
    engine.step(batch, 1e-3)
with measure_peak() as peak:
    engine.step(batch, 1e-3)
print(json.dumps({"peak": peak.host_peak_bytes, **engine.memory_components()}))
"""


def measure(update: str, script: str = SCRIPT) -> dict[str, int]:
    command = [sys.executable, "-W", "error", "-c", script, update]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_gradients_take_one_block():
    whole, layerwise = measure("accumulate"), measure("layerwise")
    assert layerwise["weights"] == whole["weights"]
    assert layerwise["optimizer_states"] == whole["optimizer_states"]
    assert layerwise["gradients"] * 9 < whole["gradients"] == whole["weights"]  # 10 blocks and small ends
    # Nine blocks of gradient are not there. On the other side stand the second gradient of a block (one micro-batch's beside the sum),
    # and what the allocator keeps of both: two blocks more.
    saved = whole["peak"] - layerwise["peak"]
    assert saved > whole["gradients"] - 4 * layerwise["gradients"]


# One small block and a large vocabulary: matrix, states and the gradients of both ends are nearly all there is.
LARGE_VOCABULARY = (
    SCRIPT.replace("dim=512, num_layers=10, num_heads=8", "dim=256, num_layers=1, num_heads=4, tie_embeddings=TIED")
    .replace("vocab_size=128, max_seq_len=8", "vocab_size=32768, max_seq_len=128")
    .replace("integers(0, 128, (4, 9))", "integers(0, 32768, (8, 129))")
)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_large_vocabulary_take_some_rows_of_it(tied):
    matrix = 32768 * 256 * 4
    peaks = {update: measure(update, LARGE_VOCABULARY.replace("TIED", str(tied))) for update in ("accumulate", "layerwise")}
    held = {update: found["weights"] + found["optimizer_states"] for update, found in peaks.items()}
    over = {update: found["peak"] - held[update] for update, found in peaks.items()}
    # accumulation has a gradient of each matrix; a layerwise step that of a tied one alone
    assert over["accumulate"] - over["layerwise"] > (0.5 if tied else 1.5) * matrix
