"""Predicted against measured peak of host memory, each in a process of its own, for models whose tensors outweigh everything else.

Text and base cost are in one temporary cache; `profiling/bench_predict.py` compares many more configurations.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_run import ROOT, write_text

pytestmark = [pytest.mark.memory, pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")]

COMMON = [
    "data.tokenizer=bytes", "data.seq_len=256", "data.val_fraction=0.1", "model.vocab_size=8000", "model.dim=512", "model.num_layers=6",
    "model.num_heads=8", "train.steps=3", "train.eval_every=3", "train.eval_sequences=4", "train.save_every=3",
    "train.global_batch_size=4", "train.micro_batch_size=2", "train.threads=1", "device=cpu",
]  # fmt: skip
CONFIGS = {
    "fp32": ["train.precision=fp32"],
    "layerwise, bf16, 4 bits": [
        "train.precision=bf16", "train.weight_dtype=bf16", "optim.state_bits=4", "train.update=layerwise",
        "train.activation_checkpointing=block", "model.dim=768", "model.num_heads=12",
    ],
    "lorpt": ["train.precision=fp32", "model.lorpt.rank=64", "model.dim=768", "model.num_heads=12"],
    "lorpt, spectron, low-rank recomputation": [
        "train.precision=bf16", "model.lorpt.rank=auto", "model.lorpt.targets=[attention, mlp]", "model.lorpt.bottleneck=silu",
        "optim.name=spectron", "optim.state_bits=8", "train.activation_checkpointing=low_rank", "model.dim=768", "model.num_heads=12",
    ],
}  # fmt: skip
PREPARE = """
import sys
from lowmem.config.load import load_run_config
from lowmem.data.prepare import prepare_data
prepare_data(load_run_config(overrides=sys.argv[1:]).data, seed=0)
"""
PREDICT = """
import json, sys
from lowmem.config.load import load_run_config
from lowmem.planning.predict import predict_peak
prediction = predict_peak(load_run_config(overrides=sys.argv[1:]))
print(json.dumps(prediction.as_dict() | {"parameters": prediction.parameters}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The text, and the cache of all tests here."""
    path = tmp_path_factory.mktemp("predict")
    write_text(path / "text.txt", lines=20000)
    return path


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_the_peak_is_predicted(folder, name):
    run_dir = folder / name.replace(", ", "-")
    settings = [
        *COMMON,
        *CONFIGS[name],
        f"data.sources=[{{path: {folder}/text.txt}}]",
        f"data.cache_dir={folder}/cache",
        f"run_dir={run_dir}",
    ]
    python("-c", PREPARE, *settings)  # the peak is to be the training's
    python("-m", "lowmem", "pretrain", "--quiet", *(f"--{setting}" for setting in settings))
    measured = json.loads((run_dir / "memory.json").read_text())["measured"]
    predicted = json.loads(python("-c", PREDICT, *settings))
    assert 15e6 < predicted["parameters"] < 60e6
    error = predicted["host_peak_bytes"] / measured["host_peak_bytes"] - 1
    assert -0.03 <= error <= 0.10, (error, predicted["host_phases"], measured["phases"])
    assert sum(predicted["components"].values()) == predicted["host_peak_bytes"]
    assert predicted["base_is"] == "measured"
    assert set(predicted["host_phases"]) == set(measured["phases"])
    tensors = predicted["host_peak_bytes"] - predicted["components"]["base"]
    assert tensors > 0.3 * predicted["host_peak_bytes"]
