"""Every parameter of a 7B shape on 8 GiB of a GPU, blocks in host memory: reserved and host memory, tokens/s; under eight minutes.

    python profiling/gpu_streaming.py --out $OUT          # writes gpu_streaming.json as it goes

lowmem's own decoder of Llama 2's 7B shape with random weights in bf16 and 4-bit AdamW, `train.weights_at=host`, boundary activations in
host memory, `budget.vram=8GiB` enforced, steps of 16k and of 64k tokens. What others take for the same: 35 to 140 tokens/s at 5.25 GiB of
VRAM and 30.8 GiB of RAM, with Adafactor and without resuming. A run that is cut off at `--seconds` is said to be, not left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_streaming import LLAMA_7B
from machine import describe_machine

RUNS = {"16k tokens a step": (8, 3), "64k tokens a step": (32, 2)}  # sequences of 2,048, and steps


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=220, help="for each run, loading included")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_streaming.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(), "runs": {}}
    for name, (sequences, steps) in RUNS.items():
        results["runs"][name] = _run(sequences, steps, arguments)
        (arguments.out / "gpu_streaming.json").write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results["runs"][name]), flush=True)


def _run(sequences: int, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shape = [flag if "num_layers" not in flag else f"--model.num_layers={arguments.layers}" for flag in LLAMA_7B]
        command = [
            sys.executable, "-m", "lowmem", "pretrain", *shape, f"--run_dir={folder}/run", "--device=cuda", "--budget.vram=8GiB",
            "--data.sources=[{stdlib: true, max_bytes: 20000000}]", "--data.tokenizer=bytes", "--data.seq_len=2048",
            "--train.update=layerwise", "--train.weight_dtype=bf16", "--optim.state_bits=4", "--train.weights_at=host",
            "--train.boundary_offload=cpu", "--train.micro_batch_size=1", f"--train.global_batch_size={sequences}",
            f"--train.steps={steps}", "--train.eval_every=0", "--train.save_every=0", "--optim.warmup_steps=1", "--force",
        ]  # fmt: skip
        began = time.perf_counter()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.seconds)
            ended = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            ended = [f"cut off after {arguments.seconds:.0f} s"]
        run = Path(folder) / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] if (run / "metrics.jsonl").exists() else []
        memory = json.loads((run / "memory.json").read_text()) if (run / "memory.json").exists() else None
        return {"seconds": round(time.perf_counter() - began, 1), "ended": ended, "steps": lines, "memory": memory}


if __name__ == "__main__":
    main()
