"""Models whose blocks live on a disk, trained by `lowmem pretrain` under an enforced budget: speed, peaks and bytes moved.

    python profiling/bench_streaming.py --part fits --out profiling/results   # 215M, resident against disk: about half an hour
    python profiling/bench_streaming.py --part 1b --out profiling/results     # every parameter of a Llama-3.2-1B shape in 1.5 GiB
    python profiling/bench_streaming.py --part 7b --out profiling/results     # every parameter of a Llama-2-7B shape in 4 GiB

Each run is a fresh process of the command that a user types; times are those of its steps after the first, from metrics.jsonl, peaks those
of its memory.json: the kernel's high-water mark, so nothing polls. In part fits resident and streamed runs take turns, and ratios are of
medians. Random weights: of the 1B a directory of transformers is made first, the 7B is lowmem's own decoder of that shape.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_machine

ROOT = Path(__file__).parent.parent
GIB = 1024**3
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
STREAMED = ["--train.weights_at=disk", "--train.boundary_offload=disk"]
SMALLEST = ["--train.update=layerwise", "--train.weight_dtype=bf16", "--optim.state_bits=4", "--device=cpu"]
TEXT = ["--data.sources=[{stdlib: true, max_bytes: 20000000}]", "--data.tokenizer=bpe", "--data.tokenizer_vocab_size=4096"]
QUIET = ["--train.eval_every=0", "--train.save_every=0", "--optim.warmup_steps=2"]
LLAMA_7B = [
    "--model.dim=4096", "--model.num_layers=32", "--model.num_heads=32", "--model.hidden_dim=11008", "--model.vocab_size=32000",
    "--model.positions=rope", "--model.norm=rmsnorm", "--model.activation=swiglu",
]  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["fits", "1b", "7b"], required=True)
    parser.add_argument("--rounds", type=int, default=3, help="of part fits")
    parser.add_argument("--steps", type=int, default=3, help="of each run; the first is not counted in times")
    parser.add_argument("--sequences", type=int, nargs="*", default=[4, 16, 64], help="of part fits, of 512 tokens")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_streaming"), help="folder for runs, on the disk that is measured")
    parser.add_argument("--out", type=Path, help="folder for the results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    parts = {"fits": _fits, "1b": _one_billion, "7b": _seven_billion}
    result = {"machine": describe_machine(), "disk": _disk_rates(arguments.work), **parts[arguments.part](arguments)}
    print(json.dumps(result, indent=1))
    if arguments.out:
        (arguments.out / f"bench_streaming_{arguments.part}.json").write_text(json.dumps(result, indent=1) + "\n")


def _fits(arguments: argparse.Namespace) -> dict[str, Any]:
    """The 215M decoder of configs/cpu/2gib_215m.yaml, whose blocks stay or stream, with and without boundaries on the disk."""
    base = ["--config", str(ROOT / "configs/cpu/2gib_215m.yaml"), *SMALLEST, *TEXT, *QUIET, "--train.activation_checkpointing=block"]
    base += ["--budget.ram=", "--train.micro_batch_size=4", "--model.vocab_size=32000"]
    kinds = {"resident": [], "disk": STREAMED}
    rows = []
    for sequences in arguments.sequences:
        rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):
            for kind, flags in kinds.items():
                size = [f"--train.global_batch_size={sequences}", f"--train.steps={arguments.steps}", "--train.tokens=0"]
                rounds[kind].append(_run(arguments.work / "fits", [*base, *flags, *size], _predict=True))
        medians = {kind: statistics.median(run["step_s"] for run in runs) for kind, runs in rounds.items()}
        rows.append(
            {
                "tokens": sequences * 512,
                "speed_of_resident": round(medians["resident"] / medians["disk"], 3),
                "tokens_per_s": {kind: round(sequences * 512 / seconds, 1) for kind, seconds in medians.items()},
                "peak_mb": {kind: round(max(run["peak_bytes"] for run in runs) / 1e6) for kind, runs in rounds.items()},
                "rounds": rounds,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"rows": rows}


def _one_billion(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of 4,096 tokens, and a resume."""
    model = arguments.work / "llama-1b"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, "-c", _MAKE, str(model), json.dumps(LLAMA_1B)], check=True)
    flags = [f"--model.path={model}", *SMALLEST, *STREAMED, *TEXT[:1], *QUIET, "--budget.ram=1.5GiB"]
    flags += ["--data.seq_len=512", "--train.global_batch_size=8", "--train.micro_batch_size=2"]
    return _trained_and_resumed(arguments, "1b", flags)


def _seven_billion(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of 4,096 tokens, and a resume."""
    flags = [*LLAMA_7B, *SMALLEST, *STREAMED, *TEXT, *QUIET, "--budget.ram=4GiB", "--train.keep_last=1"]
    flags += ["--data.seq_len=512", "--train.global_batch_size=8", "--train.micro_batch_size=2"]
    return _trained_and_resumed(arguments, "7b", flags)


def _trained_and_resumed(arguments: argparse.Namespace, name: str, flags: list[str]) -> dict[str, Any]:
    folder = arguments.work / name
    first = _run(folder, [*flags, f"--train.steps={arguments.steps}"], _predict=True)
    print(json.dumps(first), file=sys.stderr, flush=True)
    again = _run(folder, [*flags, f"--train.steps={arguments.steps + 1}"], _fresh=False)
    return {"command": flags, "run": first, "resumed": again}


def _run(folder: Path, flags: list[str], *, _predict: bool = False, _fresh: bool = True) -> dict[str, Any]:
    """What one run took; with `_predict` beside what was predicted."""
    command = [sys.executable, "-m", "lowmem", "pretrain", *flags, f"--run_dir={folder}"]
    predicted = json.loads(_output([*command, "--dry_run", "--json"]))["predicted"] if _predict else {}
    if _fresh and folder.exists():
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    before, started = len(_metrics(folder)), time.perf_counter()
    _output(command)
    return measured(folder, before, time.perf_counter() - started, predicted)


def measured(folder: Path, before: int, seconds: float, predicted: dict[str, Any]) -> dict[str, Any]:
    """What a run left of its steps after number `before`."""
    steps, memory = _metrics(folder)[before:], json.loads((folder / "memory.json").read_text())
    counted = steps[1:] or steps
    step_s = statistics.median(step["step_time_s"] for step in counted)
    tokens = steps[0]["tokens_per_s"] * steps[0]["step_time_s"]
    return {
        "steps": len(steps),
        "step_s": step_s,
        "tokens_per_s": round(tokens / step_s, 2),
        "whole_run_s": round(seconds, 1),
        "read_bytes_per_step": counted[-1].get("storage_read_bytes", 0),
        "written_bytes_per_step": counted[-1].get("storage_written_bytes", 0),
        "losses": [step["loss"] for step in steps],
        "peak_bytes": memory["measured"]["host_peak_bytes"],
        "peak_by_phase": {name: phase["host_peak_bytes"] for name, phase in memory["measured"]["phases"].items()},
        "predicted_peak_bytes": predicted.get("host_peak_bytes"),
        "predicted_tokens_per_s": predicted.get("tokens_per_s"),
        "predicted_phases": predicted.get("host_phases"),
    }


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if "loss" in line]


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-500:]}\n{result.stderr[-2000:]}")
    return result.stdout


def _disk_rates(folder: Path) -> dict[str, float]:
    """Bytes a second past the page cache, in pieces of 64 MiB."""
    from lowmem.engine.storage.disk_file import DiskFile, aligned_buffer

    file, buffer, rates = DiskFile(folder), aligned_buffer(64 << 20), {}
    start = file.reserve(16 * buffer.numel())
    buffer.fill_(1)
    for name, transfer in (("written", file.write), ("read", file.read)):
        begun = time.perf_counter()
        for piece in range(16):
            transfer(start + piece * buffer.numel(), buffer).result()
        rates[f"{name}_bytes_per_s"] = round(16 * buffer.numel() / (time.perf_counter() - begun))
    file.close()
    return {"direct": file.direct, **rates}


_MAKE = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.system.tensors import LazyTensor, write_tensors
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
config = AutoConfig.for_model("llama", **json.loads(sys.argv[2]), torch_dtype="bfloat16", architectures=["LlamaForCausalLM"])
config.save_pretrained(folder)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
def made(shape):
    return lambda: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16)
names = {n: p.shape for n, p in model.named_parameters()}
torch.manual_seed(0)
tensors = {n: LazyTensor(tuple(s), torch.bfloat16, made(tuple(s))) for n, s in names.items()}
write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
import pathlib, os
texts = [p.read_text(errors="ignore") for p in sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:60]]
HuggingFaceTokenizer.train(texts, 4096).save(folder / "tokenizer.json")
"""


if __name__ == "__main__":
    main()
