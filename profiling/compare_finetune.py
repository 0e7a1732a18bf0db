"""The methods of `lowmem finetune` on one base: what is trained, peak memory, time, loss, and what the base forgot.

    python profiling/compare_finetune.py --base runs/demo --data chat.json --text text.txt --out profiling/results/finetune_methods.json

Every method runs in a process of its own, one after the other. Peak memory is that of the whole process, libraries included. What was
forgotten is the loss on `--text`, plain text, before and after.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import describe_machine

METHODS = {
    "lora": [], "lora_plus": [], "rslora": [], "dora": [], "qlora": [], "prefix": [], "ia3": [], "head": [], "last_k": [], "full": [],
}  # fmt: skip
RATES = {
    "lora": 2e-3,
    "lora_plus": 5e-4,
    "rslora": 2e-3,
    "dora": 2e-3,
    "qlora": 2e-3,
    "prefix": 1e-2,
    "ia3": 1e-2,
    "head": 1e-3,
    "last_k": 1e-3,
    "full": 5e-4,
}
TEXT_WINDOWS = 24


def text_loss(model_directory: Path, adapter: Path | None, tokenizer_folder: Path, own: Path, text: str, seq_len: int) -> float:
    """Mean loss of plain text in windows of `seq_len` tokens."""
    from lowmem.data.tokenizer_loading import load_tokenizer
    from lowmem.finetune.base_model import load_base

    tokenizer = load_tokenizer(own if own.is_file() else tokenizer_folder)
    tokens = tokenizer.encode(text)[: TEXT_WINDOWS * seq_len + 1]
    model = load_base(model_directory, nf4=False).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens) - seq_len, seq_len):
            window = torch.tensor(tokens[start : start + seq_len + 1])
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), window[1:]).item())
    return statistics.fmean(losses)


def run_method(method: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """One method in a fresh process, then its loss on text."""
    out = folder / method
    command = [
        sys.executable, "-m", "lowmem", "finetune", "--quiet", f"--base={arguments.base}", f"--data={arguments.data}", f"--out={out}",
        f"--method={method}", f"--steps={arguments.steps}", f"--eval_every={arguments.steps}", f"--optim.lr={RATES[method]}",
        f"--seq_len={arguments.seq_len}", f"--batch_size={arguments.batch_size}", f"--micro_batch_size={arguments.micro_batch_size}",
        "--save_every=0", *METHODS[method],
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return {"method": method, "failed": result.stderr.strip().splitlines()[-1]}
    report = json.loads((out / "result.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [step["step_time_s"] for step in steps if "step_time_s" in step][1:]
    losses = {int(step): loss for step, loss in report["losses"].items()}
    base = out / "base" if (out / "base").is_dir() else Path(arguments.base)
    merged = out / "merged"
    text = Path(arguments.text).read_text(encoding="utf-8")[: 16 * TEXT_WINDOWS * arguments.seq_len]
    after = (merged, None, merged) if merged.is_dir() else (base, out / "adapter", out / "adapter")
    return {
        "method": method,
        "lr": RATES[method],
        "trainable": report["trainable"],
        "trainable_share": report["trainable"] / report["total"],
        "host_peak_bytes": report["host_peak_bytes"],
        "step_s": statistics.median(times),
        "chat_loss_before": losses[0],
        "chat_loss_after": losses[arguments.steps],
        "text_loss_before": text_loss(base, None, base, Path(arguments.base) / "tokenizer.json", text, arguments.seq_len),
        "text_loss_after": text_loss(*after, Path(arguments.base) / "tokenizer.json", text, arguments.seq_len),
    }


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
