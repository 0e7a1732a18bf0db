"""The configurations for a user's own text train a few steps from a file given on the command line, and the run then writes text."""

import json
import math
from pathlib import Path

import pytest

from tests.train.tiny_run import ROOT, lowmem, metrics, write_text

pytestmark = pytest.mark.slow


def pretrain(config: str, run_dir: Path, text: Path, **overrides: object) -> list[dict]:
    """Run a shipped configuration on `text`; returns its metrics."""
    values = {"run_dir": run_dir, "data.cache_dir": run_dir.parent / "cache", "data.sources": f"[{{path: {text}}}]", **overrides}
    result = lowmem("pretrain", "--quiet", "--config", ROOT / config, *(f"--{key}={value}" for key, value in values.items()))
    assert result.returncode == 0, result.stderr
    return metrics(run_dir)


def check_losses(lines: list[dict], steps: int, vocab_size: int, *, fall: float) -> None:
    """Finite everywhere, near ln(vocab_size) at first, and lower by `fall` at the end, on training and held-out text."""
    losses = [line["loss"] for line in lines if "loss" in line]
    val_losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(losses) == steps
    assert len(val_losses) == 2
    assert all(value is not None and math.isfinite(value) for value in losses + val_losses)
    assert losses[0] == pytest.approx(math.log(vocab_size), abs=0.5)  # initial weights of std 0.02: logits of size 0.5 at most
    assert losses[-1] < losses[0] - fall
    assert val_losses[-1] < val_losses[0]


def generate(run_dir: Path) -> dict:
    command = ["generate", "--run", run_dir, "--prompt", "def ", "--max_new_tokens", 12, "--temperature", 0, "--device", "cpu", "--json"]
    result = lowmem(*command)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_shakespeare_char_trains_and_writes(tmp_path: Path):
    text = write_text(tmp_path / "text.txt", lines=2000)
    steps = 40
    overrides = {"train.steps": steps, "train.eval_every": steps // 2, "train.save_every": steps}
    lines = pretrain("configs/cpu/shakespeare_char.yaml", tmp_path / "run", text, **overrides)
    characters = len(set(text.read_text()))
    check_losses(lines, steps, characters + 1, fall=1.0)
    result = generate(tmp_path / "run")
    assert result["text"] or result["stop_reason"] == "eos"
    assert set(result["text"]) <= set(text.read_text())


def test_i3_12m_trains_and_writes(tmp_path: Path):
    text = write_text(tmp_path / "text.txt", lines=4000)
    steps = 6
    overrides = {
        "train.steps": steps, "train.eval_every": steps // 2, "train.save_every": steps, "train.eval_sequences": 2,
        "train.global_batch_size": 2, "train.micro_batch_size": 1, "data.tokenizer_vocab_size": 300, "data.val_fraction": 0.05,
    }  # fmt: skip
    lines = pretrain("configs/cpu/i3_12m.yaml", tmp_path / "run", text, **overrides)
    check_losses(lines, steps, 4466, fall=0.2)
    components = json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["components"]
    assert components["weights"] == 4 * 12_691_186  # the published size, whatever the tokenizer learned
    result = generate(tmp_path / "run")
    assert result["text"] or result["stop_reason"] == "eos"
