"""A run so small that a test can afford dozens of them, and how to compare two of them to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TIMING_KEYS = {
    "step_time_s", "tokens_per_s", "host_peak_bytes", "cuda_allocated_bytes", "storage_read_bytes", "storage_written_bytes",
}  # fmt: skip


def tiny_arguments(run_dir: Path, text: Path, **overrides: object) -> list[str]:
    """Arguments of `lowmem pretrain` for a two-layer byte-level model on a local file."""
    values = {
        "run_dir": run_dir,
        "device": "cpu",
        "model.dim": 32,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "data.sources": f"[{{path: {text}}}]",
        "data.tokenizer": "bytes",
        "data.seq_len": 32,
        "data.val_fraction": 0.1,
        "data.cache_dir": run_dir.parent / "cache",
        "optim.lr": 0.01,
        "optim.warmup_steps": 5,
        "train.steps": 40,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.precision": "fp32",
        "train.eval_every": 10,
        "train.eval_sequences": 8,
        "train.save_every": 3,
        "train.threads": 1,
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def finetune_arguments(base: Path, chat: Path, run_dir: Path, **overrides: object) -> list[str]:
    """Arguments of `lowmem finetune` for a few steps of LoRA on a directory of transformers and conversations."""
    values = {
        "model.path": base,
        "data": chat,
        "run_dir": run_dir,
        "device": "cpu",
        "data.seq_len": 64,
        "data.val_fraction": 0.1,
        "data.cache_dir": run_dir.parent / "cache",
        "optim.lr": 0.01,
        "optim.warmup_steps": 1,
        "train.steps": 2,
        "train.global_batch_size": 2,
        "train.precision": "fp32",
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.threads": 1,
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def write_text(path: Path, lines: int = 600) -> Path:
    """Text with something to learn, the same every time."""
    path.write_text("".join(f"def function_{n % 37}(x): return x * {n % 11} + {n * n % 101}\n" for n in range(lines)))
    return path


def lowmem(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the `lowmem` command in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "lowmem", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=300,
    )  # fmt: skip


def final_bits(run_dir: Path) -> dict[str, bytes]:
    """Weights, optimizer states and loop state of the newest checkpoint, and the pointers, as bytes."""
    folder = run_dir / "checkpoints"
    newest = sorted(folder.glob("step-????????"))[-1]
    files = {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
    return files | {name: (folder / name).read_bytes() for name in ("latest", "best") if (folder / name).exists()}


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def losses_of_equal_runs(folder: Path, one: str = "whole", other: str = "parts") -> list[float]:
    """The losses of two runs below `folder`, whose weights, states and losses are equal to the bit."""
    here, there = (final_bits(folder / name) for name in (one, other))
    assert here["model.safetensors"] == there["model.safetensors"]
    assert here["optimizer.safetensors"] == there["optimizer.safetensors"]
    found, expected = ([line["loss"] for line in metrics(folder / name) if "loss" in line] for name in (one, other))
    assert found == expected
    return found
