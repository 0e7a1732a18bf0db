"""The methods of `lowmem finetune` on one base: what is trained, peak memory, time, loss, and what the base forgot.

    python profiling/compare_finetune.py --base runs/chat-hf --data chat.json --text text.txt --out profiling/results/finetune_methods.json

`--base` is a directory of transformers, such as `lowmem export` writes. Every method runs in a process of its own, one after the other.
Peak memory is that of the whole process, libraries included. What was forgotten is the loss on `--text`, plain text, before and after.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe_machine

METHODS = {
    **{method: [f"--adapter.method={method}"] for method in ("lora", "lora_plus", "rslora", "dora", "ia3", "head", "last_k")},
    "qlora": ["--adapter.method=lora", "--train.weight_dtype=nf4"],
    "full": ["--adapter.method=none"],
}
RATES = {
    "lora": 2e-3,
    "lora_plus": 5e-4,
    "rslora": 2e-3,
    "dora": 2e-3,
    "qlora": 2e-3,
    "ia3": 1e-2,
    "head": 1e-3,
    "last_k": 1e-3,
    "full": 5e-4,
}
TEXT_WINDOWS = 24


def text_loss(model_directory: Path, text: str, seq_len: int) -> float:
    """Mean loss of plain text in windows of `seq_len` tokens, by the model of transformers in a directory."""
    from transformers import AutoModelForCausalLM

    from lowmem.data.tokenizer_loading import load_tokenizer

    tokens = load_tokenizer(model_directory).encode(text)[: TEXT_WINDOWS * seq_len + 1]
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens) - seq_len, seq_len):
            window = torch.tensor(tokens[start : start + seq_len + 1])
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:]).item())
    return statistics.fmean(losses)


def numbers_of(directory: Path) -> int:
    """Numbers in the safetensors of a folder."""
    from lowmem.system.tensors import tensor_shapes

    return sum(math.prod(shape) for file in directory.glob("*.safetensors") for shape in tensor_shapes(file).values())


def run_method(method: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """One method in a fresh process, then its loss on text."""
    out, base = folder / method, Path(arguments.base)
    # the loss before the first step is that of a run whose rate is 0
    common = [
        f"--model.path={base}", f"--data={arguments.data}", f"--data.seq_len={arguments.seq_len}", "--train.eval_sequences=0",
        f"--train.global_batch_size={arguments.batch_size}", f"--train.micro_batch_size={arguments.micro_batch_size}",
        "--train.save_every=0", "--device=cpu", *METHODS[method],
    ]  # fmt: skip
    runs = {
        out: [f"--train.steps={arguments.steps}", f"--train.eval_every={arguments.steps}", f"--optim.lr={RATES[method]}"],
        folder / f"{method}-before": ["--train.steps=1", "--train.eval_every=1", "--optim.lr=0"],
    }
    for run_dir, more in runs.items():
        command = [sys.executable, "-m", "lowmem", "finetune", "--quiet", f"--run_dir={run_dir}", *common, *more]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            return {"method": method, "failed": result.stderr.strip().splitlines()[-1]}
    before, after = held_out_loss(folder / f"{method}-before"), held_out_loss(out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    text = Path(arguments.text).read_text(encoding="utf-8")[: 16 * TEXT_WINDOWS * arguments.seq_len]
    trained = trained_numbers(out)
    return {
        "method": method,
        "lr": RATES[method],
        "trainable": trained,
        "trainable_share": trained / numbers_of(base),
        "host_peak_bytes": json.loads((out / "memory.json").read_text())["measured"]["host_peak_bytes"],
        "step_s": statistics.median([line["step_time_s"] for line in lines if "step_time_s" in line][1:]),
        "chat_loss_before": before,
        "chat_loss_after": after,
        "text_loss_before": text_loss(base, text, arguments.seq_len),
        "text_loss_after": text_loss(out / "merged", text, arguments.seq_len),
    }


def held_out_loss(run_dir: Path) -> float:
    """Of the last evaluation."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line][-1]


def trained_numbers(run_dir: Path) -> int:
    """Of an adapter, or of the part of the weights that a checkpoint holds."""
    adapter = run_dir / "adapter"
    if adapter.is_dir():
        return numbers_of(adapter)
    from lowmem.system.tensors import tensor_shapes

    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    return sum(math.prod(shape) for shape in tensor_shapes(newest / "model.safetensors").values())


def table(rows: list[dict]) -> str:
    """Markdown; times relative to lora."""
    lora = next(row["step_s"] for row in rows if row["method"] == "lora")
    lines = ["| method | trained | peak RAM | step time | chat loss | text loss |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['method']} | {row['failed']} | | | | |")
            continue
        chat, text = (f"{row[f'{kind}_loss_before']:.3f} → {row[f'{kind}_loss_after']:.3f}" for kind in ("chat", "text"))
        lines.append(
            f"| {row['method']} | {100 * row['trainable_share']:.2f} % | {row['host_peak_bytes'] / 2**20:.0f} MiB "
            f"| {row['step_s'] / lora:.2f} | {chat} | {text} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_method(method, arguments, Path(folder)) for method in arguments.methods]
    settings = {key: value for key, value in vars(arguments).items() if key not in ("base", "data", "text", "out")}
    Path(arguments.out).write_text(json.dumps({"machine": describe_machine(), "settings": settings, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
