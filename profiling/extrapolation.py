"""Does a model trained on 128 tokens read 256? RoPE against ALiBi, same settings, on held-out text of the standard library.

    python profiling/extrapolation.py --out profiling/results            # three seeds of each, two runs at once
    python profiling/extrapolation.py --steps 3 --seeds 0 --windows 4    # a quick look, nothing written

Each run trains at 128, then reads the same held-out windows of 256 tokens twice: whole, and as two halves that know nothing of each
other. Losses are nats a token. Adds to results/extrapolation.json; a run that is there already is not repeated.

    halves       all tokens, at most 128 in view: what was trained
    whole        all tokens, up to 256 in view
    late, halves  tokens 129 to 256 of a window, those before 129 hidden
    late, whole   the same tokens, all before them in view: lower than in halves if the longer context helps, higher if it harms
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL = {"dim": 192, "num_layers": 4, "num_heads": 4, "vocab_size": 4096}
POSITIONS = ("rope", "alibi")
TRAINED, READ = 128, 256
GLOBAL_BATCH, LEARNING_RATE, WARMUP, BIN = 16, 2e-3, 40, 32
LOSSES = ("halves", "whole", "late, halves", "late, whole")


def main() -> None:
    """Parse the command line, run what is missing, print the table and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=256, help="held-out windows of 256 tokens")
    parser.add_argument("--out", type=Path, help="folder of extrapolation.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train(json.loads(arguments.child))))
        return
    path = arguments.out and arguments.out / "extrapolation.json"
    runs = json.loads(path.read_text())["runs"] if path and path.exists() else {}
    settings = {
        f"{positions}, seed {seed}": {"positions": positions, "seed": seed, "steps": arguments.steps, "windows": arguments.windows}
        for seed in arguments.seeds
        for positions in POSITIONS
    }
    missing = {name: setting for name, setting in settings.items() if runs.get(name, {}).get("setting") != setting}
    with ThreadPoolExecutor(2) as pool:
        for name, result in zip(missing, pool.map(child, missing.values()), strict=True):
            runs[name] = {"setting": missing[name], **result}
            print(f"{name}: {result['losses']} ({result['seconds']:.0f} s)", file=sys.stderr, flush=True)
            if path:
                write(path, runs)
    if path:
        write(path, runs)  # also where nothing was missing: the table may have changed
    print("\n".join(table({name: runs[name] for name in settings})))


def child(setting: dict) -> dict:
    """One run in a process of its own."""
    result = subprocess.run([sys.executable, __file__, "--child", json.dumps(setting)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def write(path: Path, runs: dict[str, dict]) -> None:
    """Everything so far as JSON."""
    from machine import describe_machine

    shape = {**MODEL, "trained_seq_len": TRAINED, "read_seq_len": READ, "global_batch_size": GLOBAL_BATCH, "lr": LEARNING_RATE}
    document = {"machine": describe_machine(), "shape": shape, "text": "the standard library", "summary": summary(runs), "runs": runs}
    path.write_text(json.dumps(document, indent=1) + "\n")


def summary(runs: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """Means over seeds, by positions; and what the longer view changed, run by run."""
    found: dict[str, dict[str, Any]] = {}
    for positions in POSITIONS:
        mine = [run for run in runs.values() if run["setting"]["positions"] == positions]
        if mine:
            change = [run["losses"]["late, whole"] - run["losses"]["late, halves"] for run in mine]
            found[positions] = {
                **{name: round(statistics.mean(run["losses"][name] for run in mine), 4) for name in LOSSES},
                "late, whole less halves, by run": [round(value, 4) for value in change],
                "by position": [round(statistics.mean(values), 4) for values in zip(*(run["by_position"] for run in mine), strict=True)],
            }
    return found


def table(runs: dict[str, dict]) -> list[str]:
    """Two Markdown tables: the four losses, and the loss by position in a window of 256."""
    rows = summary(runs)
    bins = [f"{start + 1} to {start + BIN}" for start in range(0, READ, BIN)]
    head = ["trained at 128", *LOSSES, "longer view (seeds)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for positions, row in rows.items():
        change = row["late, whole less halves, by run"]
        seeds = f"{statistics.mean(change):+.3f} ({min(change):+.3f} to {max(change):+.3f})"
        lines.append(f"| {positions} | {' | '.join(f'{row[name]:.3f}' for name in LOSSES)} | {seeds} |")
    lines += ["", f"| loss of tokens | {' | '.join(bins)} |", "|---" * (len(bins) + 1) + "|"]
    lines += [f"| {positions} | {' | '.join(f'{value:.3f}' for value in row['by position'])} |" for positions, row in rows.items()]
    return lines


def train(setting: dict) -> dict:
    """In the child: one run."""
    import torch

    from lowmem.config.schema import DataConfig, ModelConfig, OptimConfig, SourceConfig
    from lowmem.data.prepare import prepare_data
    from lowmem.engine.local import LocalEngine
    from lowmem.models.registry import build_model
    from lowmem.optim.from_config import learning_rate

    torch.set_num_threads(1)
    seed, steps = setting["seed"], setting["steps"]
    short, long = (
        prepare_data(DataConfig(sources=[SourceConfig(stdlib=True)], tokenizer_vocab_size=MODEL["vocab_size"], seq_len=seq_len), seed=seed)
        for seq_len in (TRAINED, READ)
    )
    assert short.description["sources"] == long.description["sources"], "the held-out text depends on the length"
    config = ModelConfig(**MODEL, positions=setting["positions"])
    model = build_model(config, vocab_size=MODEL["vocab_size"], max_seq_len=TRAINED, seed=seed)
    optim = OptimConfig(lr=LEARNING_RATE, warmup_steps=min(WARMUP, steps - 1))
    engine = LocalEngine(model, optim, device=torch.device("cpu"), precision="bf16", micro_batch_size=GLOBAL_BATCH, seed=seed)
    started, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        losses.append(engine.step(short.train.batch(GLOBAL_BATCH, seq_len=TRAINED, step=step), learning_rate(optim, step, steps)).loss)
    seconds = time.perf_counter() - started
    assert long.validation is not None
    return {
        **read(model, long.validation.batches(setting["windows"])),
        "train_loss_last_50": round(statistics.mean(losses[-50:]), 4),
        "parameters": model.num_parameters(),
        "tokens": steps * GLOBAL_BATCH * TRAINED,
        "seconds": round(seconds, 1),
    }


def read(model, batches) -> dict:
    """Losses of the same text in one view of 256 tokens and in two of 128, in fp32."""
    import torch
    import torch.nn.functional as F

    def token_losses(inputs, targets):
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    model.eval()
    whole, halves = [], []
    with torch.inference_mode():
        for batch in batches:
            inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
            whole.append(token_losses(inputs, targets))
            halves.append(token_losses(inputs.reshape(-1, TRAINED), targets.reshape(-1, TRAINED)).view(targets.shape))
    whole_NT, halves_NT = torch.cat(whole).double(), torch.cat(halves).double()
    values = {
        "halves": halves_NT,
        "whole": whole_NT,
        "late, halves": halves_NT[:, TRAINED:],
        "late, whole": whole_NT[:, TRAINED:],
    }
    return {
        "losses": {name: round(values[name].mean().item(), 5) for name in LOSSES},
        "by_position": [round(value, 5) for value in whole_NT.view(-1, READ // BIN, BIN).mean((0, 2)).tolist()],
        "early_tokens_differ_by": (whole_NT[:, :TRAINED] - halves_NT[:, :TRAINED]).abs().max().item(),
        "windows": len(whole_NT),
    }


if __name__ == "__main__":
    main()
