"""Losses of twenty steps of every kind of run, to the last bit: what a refactoring must not change.

    python profiling/golden_runs.py --record /tmp/golden.json   # before
    python profiling/golden_runs.py --check /tmp/golden.json    # after: exit code 1 names the runs that differ

Bits are equal on one machine with one PyTorch; the file is not committed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 20
COMMON = {
    "data.tokenizer": "bytes", "data.seq_len": 64, "model.dim": 128, "model.num_layers": 2, "model.num_heads": 2, "device": "cpu",
    "train.steps": STEPS, "train.global_batch_size": 8, "train.micro_batch_size": 4, "train.precision": "fp32", "train.eval_every": 10,
    "train.save_every": 10, "train.threads": 1, "optim.warmup_steps": 2,
}  # fmt: skip
PHASES = "[{steps: 10}, {kind: chat, steps: 10, sources: [{path: CHAT}]}]"
BF16 = {"train.precision": "bf16", "train.weight_dtype": "bf16"}
LAYERWISE = {"train.update": "layerwise", "train.activation_checkpointing": "block"}
RUNS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "lorpt": {"model.lorpt.rank": 16},
    "lorpt, spectron, grown": {"model.lorpt.rank": 16, "model.lorpt.schedule": "{10: 24}", "optim.name": "spectron"},
    "i3": {"model.name": "i3", "model.num_heads": 1, "model.attention_rank": 16},
    "layerwise": LAYERWISE,
    "layerwise, bf16, 4 bits": {**LAYERWISE, **BF16, "optim.state_bits": 4},
    "4 bits": {"optim.state_bits": 4},
    "lion, 8 bits": {"optim.name": "lion", "optim.state_bits": 8},
    "int8 weights": {"train.weight_dtype": "int8"},
    "two phases": {"phases": PHASES, "train.steps": 0},
    "zero 2, two ranks": {"engine.name": "deepspeed", "engine.zero_stage": 2},
}
FINETUNE = {**COMMON, "data.seq_len": 64, "train.save_every": 10}
for key in ("data.tokenizer", "model.dim", "model.num_layers", "model.num_heads"):
    del FINETUNE[key]
FINETUNED: dict[str, dict[str, Any]] = {
    "finetune lora": {},
    "finetune full": {"adapter.method": "none"},
    "finetune full, layerwise, bf16, 8 bits": {
        "adapter.method": "none", "train.update": "layerwise", "train.precision": "bf16", "train.weight_dtype": "bf16",
        "optim.state_bits": 8,
    },
    "finetune qlora": {"train.weight_dtype": "nf4"},
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Text, conversations, and a directory of transformers."""
    lines = [f"def function_{n % 37}(x): return x * {n % 11} + {n * n % 101}\n" for n in range(2000)]
    (folder / "text.txt").write_text("".join(lines))
    records = [
        {"messages": [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"it is {n * 3 + 1}."}]}
        for n in range(400)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(folder, "base", {**COMMON, "train.steps": 2})
    lowmem("export", f"--run={folder / 'base'}", f"--out={folder / 'hf'}", "--format=hf")


def lowmem(*words: str, ranks: int = 1) -> None:
    """One command in a process of its own, or in several under DeepSpeed's launcher."""
    command = [sys.executable, "-m", "lowmem"]
    if ranks > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        launcher = str(Path(sys.executable).parent / "deepspeed")
        command = [launcher, "-q", "--no_local_rank", "--master_port", str(port), "--num_gpus", str(ranks), "--module", "lowmem"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {result.returncode}:\n{result.stderr[-2000:]}")


def run(folder: Path, name: str, settings: dict[str, Any]) -> list[dict[str, str]]:
    """`lowmem pretrain`; what it wrote of each step."""
    fixed = {"data.sources": f"[{{path: {folder}/text.txt}}]", "data.cache_dir": folder / "cache", "run_dir": folder / name}
    values = {key: str(value).replace("CHAT", str(folder / "chat.jsonl")) for key, value in {**settings, **fixed}.items()}
    ranks = 2 if settings.get("engine.name") == "deepspeed" else 1
    lowmem("pretrain", "--quiet", *(f"--{key}={value}" for key, value in values.items()), ranks=ranks)
    return numbers(folder / name / "metrics.jsonl")


def finetune(folder: Path, name: str, settings: dict[str, Any]) -> list[dict[str, str]]:
    """`lowmem finetune` of the exported directory; what it wrote of each step."""
    values = {**FINETUNE, **settings, "model.path": folder / "hf", "data": folder / "chat.jsonl", "run_dir": folder / name}
    lowmem("finetune", "--quiet", *(f"--{key}={value}" for key, value in values.items()))
    return numbers(folder / name / "metrics.jsonl")


def numbers(metrics: Path) -> list[dict[str, str]]:
    """Losses and gradient norms, with every bit."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [{key: float(line[key]).hex() for key in ("loss", "grad_norm", "val_loss") if key in line} for line in lines]
    return [line for line in kept if line]


def main() -> int:
    """Parse the command line, run everything, record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    flags = parser.parse_args()
    if (flags.record is None) == (flags.check is None):
        parser.error("give --record FILE or --check FILE")
    found: dict[str, list[dict[str, str]]] = {}
    with tempfile.TemporaryDirectory(prefix="lowmem-golden-") as name:
        folder = Path(name)
        make_inputs(folder)
        for kind, runs in ((run, RUNS), (finetune, FINETUNED)):
            for title, settings in runs.items():
                if flags.only in title:
                    found[title] = kind(folder, title.replace(" ", "-").replace(",", ""), {**(COMMON if kind is run else {}), **settings})
                    print(f"{title}: {len(found[title])} lines, last {found[title][-1]}", file=sys.stderr, flush=True)
    if flags.record:
        flags.record.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    expected = json.loads(flags.check.read_text())
    changed = [title for title, lines in found.items() if lines != expected[title]]
    print(f"{len(found) - len(changed)} of {len(found)} runs are equal to the last bit; others: {changed or 'none'}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
