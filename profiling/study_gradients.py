"""Layerwise updates of bf16 weights with the embedding's gradient summed in fp32, as lowmem does, and in bf16, as PyTorch does on a CPU.

    python profiling/study_gradients.py --out profiling/results/study_gradients.json

For each shape: the gradient norm of the first step against that of fp32 weights, and the losses of 50 steps. A run that is in the file
already is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

LAYERWISE = ["train.update=layerwise", "train.activation_checkpointing=block", "train.eval_every=0", "train.save_every=0", "device=cpu"]
SHAPES = {
    "demo, 32,768 byte tokens": [
        "configs/cpu/demo.yaml",
        "data.tokenizer=bytes",
        "train.global_batch_size=256",
        "train.micro_batch_size=32",
    ],
    "demo": ["configs/cpu/demo.yaml"],
    "215M, 2,048 tokens": [
        "configs/cpu/llama_215m.yaml",
        "train.global_batch_size=4",
        "optim.warmup_steps=10",
        "data.sources=[{stdlib: true}]",
    ],
}
RUNS = {
    "fp32 weights": (1, "fp32", "exact"),
    "bf16 weights, sums in fp32": (50, "bf16", "exact"),
    "bf16 weights, sums in bf16": (50, "bf16", "torch"),
}


def run(shape: str, name: str) -> dict[str, Any]:
    """Loss and gradient norm of every step, from a process of its own."""
    config, *settings = SHAPES[shape]
    steps, dtype, sums = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run_dir={folder}/run", f"train.steps={steps}", "train.tokens=0", f"train.weight_dtype={dtype}", "train.precision=bf16"]
        options = [f"--{setting}" for setting in [*LAYERWISE, *settings, *fixed]]
        command = [sys.executable, __file__, "--one", sums, "--config", str(ROOT / config), *options]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": [line["loss"] for line in lines if "loss" in line],
        "grad_norm": [line["grad_norm"] for line in lines if "loss" in line],
    }


def run_here(sums: str, argv: list[str]) -> int:
    """`lowmem pretrain`, with PyTorch's own gradient of an embedding if `sums` is torch."""
    import torch

    from lowmem.cli.pretrain import pretrain_main
    from lowmem.nn import layers

    if sums == "torch":
        layers.embedding_gradient = lambda indices, grad, rows, padding_idx=-1: torch.ops.aten.embedding_dense_backward(
            grad, indices, rows, padding_idx, False
        )
    return pretrain_main(argv)


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        return run_here(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "results" / "study_gradients.json")
    flags = parser.parse_args()
    from profiling.machine import describe_machine

    document = json.loads(flags.out.read_text()) if flags.out.exists() else {"machine": describe_machine(), "runs": {}}
    for shape in flags.shapes:
        done = document["runs"].setdefault(shape, {})
        for name in RUNS:
            if name not in done:
                done[name] = run(shape, name)
                flags.out.write_text(json.dumps(document, indent=1) + "\n")
        exact = done["fp32 weights"]["grad_norm"][0]
        for name in RUNS:
            norm, losses = done[name]["grad_norm"][0], done[name]["loss"]
            against = f"first norm {norm:.4f} ({norm / exact - 1:+.2%} of fp32 weights')"
            print(f"{shape}: {name}: {against}, loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
