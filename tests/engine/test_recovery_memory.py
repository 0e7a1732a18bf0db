"""Under a limit that is real, in fresh processes: training goes on with what fits."""

import json
import subprocess
import sys

import pytest

from lowmem.memory.procfs import status_bytes
from tests.train.tiny_run import ROOT

pytestmark = [
    pytest.mark.memory,
    pytest.mark.skipif("VmData" not in (status_bytes() or {}), reason="this kernel does not tell a process's private memory"),
]

# 2 layers of 256 sequences of 128 tokens keep more than qkv (3 * 64 numbers) and gate_up (2 * 256) of each token in fp32:
# 2 * 704 * 32768 * 4 bytes = 185 MB, and one layer with the gradients of half of that and three boundaries of 8 MB nearly as much.
# The limit leaves 160 MB; micro-batches of 16 need a sixteenth.
SCRIPT = """
import json, sys
import numpy as np, torch
from lowmem.config.schema import ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.memory.limits import CODE_BYTES, RESERVE_BYTES, limit_host_memory
from lowmem.memory.procfs import status_bytes
from lowmem.models.registry import build_model

torch.set_num_threads(1)
model = build_model(ModelConfig(dim=64, num_layers=2, num_heads=2), vocab_size=96, max_seq_len=128, seed=0)
settings = {"device": torch.device("cpu"), "precision": "fp32", "micro_batch_size": 256}
if sys.argv[1] == "layerwise":
    model.activation_checkpointing = "block"
    engine = LayerwiseEngine(model, OptimConfig(), TrainConfig(update="layerwise"), **settings)
else:
    engine = LocalEngine(model, OptimConfig(state_bits=8), **settings)
batches = [Batch.from_windows(np.random.default_rng(seed).integers(0, 96, (256, 129))) for seed in range(2)]
before = set(sys.modules)
limit_host_memory(status_bytes()["VmRSS"] + RESERVE_BYTES + CODE_BYTES + 160_000_000)
losses = [engine.step(batch, 1e-3).loss for batch in batches]
sizes = [engine.micro_batch_size, *getattr(engine, "block_micro_batches", [])]
print(json.dumps({"losses": losses, "sizes": sizes, "messages": engine.messages, "imported": sorted(set(sys.modules) - before)}))
"""


@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
def test_a_run_under_a_real_limit_goes_on_with_smaller_micro_batches(update):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, update]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert max(found["sizes"]) <= 256
    assert min(found["sizes"]) < 256
    assert found["messages"]
    assert all(4 < loss < 5 for loss in found["losses"])  # near log(96) = 4.56
    # an import that runs out of memory could not be repeated; this one is a page, by torch's wrapper of Optimizer.step
    assert set(found["imported"]) <= {"torch.profiler._cupti_monitor"}
