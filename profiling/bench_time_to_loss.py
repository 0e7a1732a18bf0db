"""Time to a loss on character-level Shakespeare: lowmem's configuration against a plain GPT with the usual recipe.

    python profiling/bench_time_to_loss.py --text tinyshakespeare.txt --out profiling/results     # ten minutes; bench_time_to_loss.json

The plain GPT is written below: 4 layers, 4 heads, width 128, context 64, batch 12, AdamW at 1e-3 with warm-up and cosine over 2,000
steps, fp32, no dropout. lowmem trains `configs/cpu/shakespeare_char.yaml` through its command line. The first 90 % of the characters
train, the rest is evaluated in full by both, in windows of 64. Both are fresh processes, taken in turn; each counts the seconds of its
steps, evaluations excluded, and of the whole process; memory is the kernel's high-water mark of the process.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS, WARMUP = 4, 4, 128, 64, 12, 2000, 100
LR, MIN_LR, BETAS, DECAY = 1e-3, 1e-4, (0.9, 0.99), 0.1
TRAIN_SHARE = 0.9


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for bench_time_to_loss.json")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(train_plain_gpt(arguments.text.read_text(), seed=arguments.child)))
        return
    rounds = []
    for seed in range(arguments.rounds):
        plain = measured([sys.executable, __file__, "--text", str(arguments.text), "--child", str(seed)])
        plain = {**json.loads(plain.pop("stdout")), **plain}
        rounds.append({"plain": plain, "lowmem": run_lowmem(arguments.text, seed)})
        print(json.dumps(rounds[-1]), flush=True)
    document = {"summary": summary(rounds), "rounds": rounds}
    print(json.dumps(document["summary"], indent=1))
    if arguments.out:
        from machine import describe_machine

        (arguments.out / "bench_time_to_loss.json").write_text(json.dumps({"machine": describe_machine(), **document}, indent=1) + "\n")


def summary(rounds: list[dict]) -> dict:
    """Losses, and lowmem's time and memory relative to the plain GPT's in the same round: median, smallest, largest."""
    ratios = {
        f"{key}_ratio": [round(f(r["lowmem"][key] / r["plain"][key] for r in rounds), 3) for f in (_median, min, max)]
        for key in ("train_s", "process_s", "peak_mb")
    }
    losses = {f"{name}_val_loss": [r[name]["val_loss"] for r in rounds] for name in ("plain", "lowmem")}
    return {**losses, **ratios, "targets_evaluated": sorted({r[name]["targets"] for r in rounds for name in ("plain", "lowmem")})}


def _median(values) -> float:  # type: ignore[no-untyped-def]
    return statistics.median(list(values))


def measured(command: list[str]) -> dict:
    """Standard output, seconds and peak memory of a process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise SystemExit(f"{command} ended with {process.returncode}")
        output.seek(0)
        return {"stdout": output.read().decode(), "process_s": round(seconds, 2), "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1)}


def run_lowmem(text: Path, seed: int) -> dict:
    """One run of the committed configuration."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        sources = json.dumps([{"path": str(text.resolve())}])
        command = [sys.executable, "-m", "lowmem", "pretrain", "--config", "configs/cpu/shakespeare_char.yaml"]
        found = measured([*command, f"--data.sources={sources}", f"--run_dir={run_dir}", f"--train.seed={seed}"])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_time_s" in line]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    return {
        "val_loss": round(losses[-1], 4),
        "train_s": round(sum(line["step_time_s"] for line in steps), 2),
        "steps": len(steps),
        "targets": targets_evaluated(text),
        "process_s": found["process_s"],
        "peak_mb": found["peak_mb"],
    }


def targets_evaluated(text: Path) -> int:
    """Predicted characters of lowmem's evaluation, by its own data code."""
    from lowmem.config.load import load_run_config
    from lowmem.data.prepare import prepare_data

    overrides = [f"data.sources={json.dumps([{'path': str(text.resolve())}])}"]
    data = prepare_data(load_run_config(ROOT / "configs/cpu/shakespeare_char.yaml", overrides).data, seed=0)
    return sum(len(part) * CONTEXT for part in data.validation.windows(0))


def train_plain_gpt(text: str, seed: int) -> dict:
    """In the child: the usual recipe, with PyTorch alone."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    characters = sorted(set(text))
    index = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in text])
    cut = int(TRAIN_SHARE * len(tokens))
    train, held_out = tokens[:cut], tokens[cut:]
    model = plain_gpt(len(characters))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    started = time.perf_counter()
    for step in range(STEPS):
        progress = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
        lr = LR * (step + 1) / WARMUP if step < WARMUP else MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        windows = torch.stack([train[start : start + CONTEXT + 1] for start in starts])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(held_out) - CONTEXT, CONTEXT):
            window = held_out[start : start + CONTEXT + 1].unsqueeze(0)
            total += F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
            count += window.shape[1] - 1
    return {"val_loss": round(total / count, 4), "train_s": round(seconds, 2), "steps": STEPS, "targets": count}


def plain_gpt(vocab_size: int):  # type: ignore[no-untyped-def]
    """GPT-2's architecture: learned positions, LayerNorm before, GELU, tied head, no biases."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        """Attention and a feed-forward layer."""

        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x):  # type: ignore[no-untyped-def]
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norm_2(x))))

    class GPT(nn.Module):
        """Logits."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.positions = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim >= 2:
                    residual = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

        def forward(self, tokens):  # type: ignore[no-untyped-def]
            x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
            return F.linear(self.norm(self.blocks(x)), self.embedding.weight)

    return GPT()


if __name__ == "__main__":
    main()
