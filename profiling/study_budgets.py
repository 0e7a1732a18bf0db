"""Plans for budgets of RAM, trained under the limit: what was planned, what it took, and whether it held.

    python profiling/study_budgets.py --out profiling/results      # about an hour on two cores; writes study_budgets.json

For each budget `lowmem plan` chooses the settings, `lowmem pretrain` trains `--steps` steps under the enforced limit, and `--solve` finds
the largest number of layers that fits, of which the next one must not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine

from lowmem.system.units import parse_bytes

# What is trained in each budget: a smaller model where 215M parameters would not fit, a larger one where they would leave much unused.
SHAPES = {
    "1GiB": ("42M", 512, 1408, 8, 8, 16000),
    "1.5GiB": ("215M", 1024, 2688, 12, 16, 32000),
    "2GiB": ("215M", 1024, 2688, 12, 16, 32000),
    "4GiB": ("215M", 1024, 2688, 12, 16, 32000),
    "8GiB": ("361M", 1024, 2688, 24, 16, 32000),
}
COMMON = [
    "data.sources=[{stdlib: true, max_bytes: 3000000}]", "data.tokenizer=bytes", "data.seq_len=128", "train.global_batch_size=8",
    "train.eval_every=25", "train.eval_sequences=16", "train.save_every=50", "device=cpu",
]  # fmt: skip


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solve", action="store_true", help="also solve for model.num_layers and train beside the border")
    parser.add_argument("--out", type=Path, help="folder for study_budgets.json")
    arguments = parser.parse_args()
    path = arguments.out / "study_budgets.json" if arguments.out else None
    rows = json.loads(path.read_text())["rows"] if path and path.exists() else {}
    for budget in arguments.budgets:
        rows[budget] = trained(budget, arguments.steps)
        print(budget, json.dumps(rows[budget]), flush=True)
        if arguments.solve:
            rows[budget]["solve"] = solved(budget)
            print(budget, json.dumps(rows[budget]["solve"]), flush=True)
        if path:
            path.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


def settings(budget: str) -> list[str]:
    """The model and data for a budget, as command line options."""
    _, dim, hidden, layers, heads, vocabulary = SHAPES[budget]
    shape = [f"model.dim={dim}", f"model.hidden_dim={hidden}", f"model.num_layers={layers}", f"model.num_heads={heads}"]
    return [f"--{item}" for item in [*COMMON, *shape, f"model.vocab_size={vocabulary}", f"budget.ram={budget}"]]


def trained(budget: str, steps: int) -> dict:
    """Plan, then train under the limit."""
    with tempfile.TemporaryDirectory() as folder:
        planned = Path(folder) / "plan.yaml"
        lowmem("plan", *settings(budget), f"--train.steps={steps}", f"--run_dir={folder}/run", "--write", str(planned))
        result = lowmem("pretrain", "--quiet", "--config", str(planned), check=False)
        row = {"model": SHAPES[budget][0], "exit_code": result.returncode, "message": result.stderr.strip()[-300:]}
        if result.returncode:
            return row
        report = json.loads((Path(folder) / "run" / "memory.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        done = [line for line in lines if "tokens_per_s" in line]
        predicted, measured, limit = (
            report["predicted"]["host_peak_bytes"], report["measured"]["host_peak_bytes"], parse_bytes(budget),
        )  # fmt: skip
        chosen = [line for line in planned.read_text().splitlines() if any(key in line for key in KEYS)]
        return row | {
            "steps": len(done),
            "planned_micro_batch": next(int(line.split(":")[1]) for line in chosen if "micro_batch_size" in line),
            "micro_batches_used": sorted({line["micro_batch_size"] for line in done}),
            "chosen": [line.strip() for line in chosen],
            "predicted_mb": round(predicted / 1e6),
            "measured_mb": round(measured / 1e6),
            "budget_mb": round(limit / 1e6),
            "used_share": round(measured / limit, 3),
            "error": round(predicted / measured - 1, 4),
            "tokens_per_s": round(sorted(line["tokens_per_s"] for line in done)[len(done) // 2], 1),
            "predicted_tokens_per_s": report["predicted"]["tokens_per_s"],
            "loss": [done[0]["loss"], done[-1]["loss"]],
        }


KEYS = ("micro_batch_size", "activation_checkpointing:", "update:", "state_bits", "weight_dtype")


def solved(budget: str) -> dict:
    """The largest number of layers that fits, trained for two steps; the prediction for one more."""
    narrow = [
        "--train.update=layerwise", "--train.activation_checkpointing=block", "--optim.state_bits=4", "--train.micro_batch_size=2",
        "--train.precision=bf16", "--train.weight_dtype=bf16", "--train.steps=2", "--train.eval_every=2",
    ]  # fmt: skip
    answer = json.loads(lowmem("plan", *settings(budget), *narrow, "--solve=model.num_layers", "--json").stdout)
    with tempfile.TemporaryDirectory() as folder:
        largest = [*settings(budget), *narrow, f"--run_dir={folder}/run", f"--model.num_layers={answer['value']}"]
        result = lowmem("pretrain", "--quiet", *largest, check=False)
        report = json.loads((Path(folder) / "run" / "memory.json").read_text())
    beyond = json.loads(lowmem("pretrain", *largest, f"--model.num_layers={answer['next']}", "--dry_run", "--json", check=False).stdout)
    limit = parse_bytes(budget)
    return {
        "num_layers": answer["value"],
        "parameters": answer["parameters"],
        "exit_code": result.returncode,
        "measured_share": round(report["measured"]["host_peak_bytes"] / limit, 3),
        "next_share_predicted": round(beyond["predicted"]["host_peak_bytes"] / limit, 4),
    }


def lowmem(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run the command in a fresh process."""
    return subprocess.run([sys.executable, "-m", "lowmem", *arguments], capture_output=True, text=True, check=check)


if __name__ == "__main__":
    main()
