"""Predicted against measured peak of host memory for factors and codes of a model of transformers, each run in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference.tiny_families import save_tiny
from tests.train.tiny_run import ROOT, write_text

pytestmark = [pytest.mark.memory, pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")]
SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 6,
    "head_dim": 64, "vocab_size": 16000,
}  # fmt: skip
COMMON = [
    "data.seq_len=64", "data.val_fraction=0.1", "train.steps=2", "train.eval_every=0", "train.save_every=0", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.threads=1", "device=cpu", "budget.ram=8GB", "adapter.merge=false",
]  # fmt: skip
CONFIGS = {
    "factors": ["train.precision=fp32", "model.lorpt.rank=auto"],
    "int4, layerwise, bf16": ["train.precision=bf16", "train.weight_dtype=int4", "optim.state_bits=4", "train.update=layerwise"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    save_tiny(path / "model", "llama", **SHAPE)
    write_text(path / "text.txt", lines=20000)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_the_peak_is_what_was_predicted(folder: Path, name: str) -> None:
    run = folder / name.replace(", ", "-")
    places = [
        f"model.path={folder}/model",
        f"data.sources=[{{path: {folder}/text.txt}}]",
        f"data.cache_dir={folder}/cache",
        f"run_dir={run}",
    ]
    command = [sys.executable, "-m", "lowmem", "pretrain", "--quiet", *(f"--{text}" for text in [*places, *COMMON, *CONFIGS[name]])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "memory.json").read_text())
    predicted, measured = (report[kind]["host_peak_bytes"] for kind in ("predicted", "measured"))
    assert abs(predicted / measured - 1) < 0.05
