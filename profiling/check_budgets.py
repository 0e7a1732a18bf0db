"""A hundred enforced budgets between what a process takes before its first tensor and what a run needs: how each of them ends.

    python profiling/check_budgets.py --out profiling/results/check_budgets.json [--budgets 100] [--no_compiler]

Each budget is a run in a fresh process. In order are exit code 0, with a measured peak within the budget, and exit code 3, with one line.
What is in the output file already is not run again, so that the study can be interrupted.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe_machine

MIB = 1 << 20
STRIDE = 37  # budgets are taken far from each other, so that a part of them covers the whole range
SHAPE = {
    "data.tokenizer": "bytes", "data.seq_len": 64, "model.dim": 64, "model.num_layers": 2, "model.num_heads": 2, "device": "cpu",
    "train.steps": 2, "train.global_batch_size": 512, "train.micro_batch_size": 512, "train.eval_every": 2, "train.save_every": 2,
    "train.threads": 1, "train.activation_checkpointing": "none",
}  # fmt: skip


def run(folder: Path, name: str, settings: dict[str, Any], compiler: bool) -> dict[str, Any]:
    """One run of `lowmem pretrain`: exit code, lines on standard error, and the measured peak if there is one."""
    values = {
        **SHAPE,
        **settings,
        "data.sources": f"[{{path: {folder}/text.txt}}]",
        "run_dir": folder / name,
        "data.cache_dir": folder / "cache",
    }
    command = [
        sys.executable,
        "-m",
        "lowmem",
        "pretrain",
        "--quiet",
        "--force",
        *(f"--{key}={value}" for key, value in values.items()),
    ]
    environment = os.environ if compiler else {**os.environ, "CXX": "none", "PATH": "", "XDG_CACHE_HOME": str(folder / "uncompiled")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    report = folder / name / "memory.json"
    peak = json.loads(report.read_text())["measured"]["host_peak_bytes"] if report.exists() else None
    return {"exit_code": result.returncode, "lines": len(result.stderr.splitlines()), "said": result.stderr[-300:], "peak_bytes": peak}


def in_order(answer: dict[str, Any], compiler: bool) -> bool:
    """Whether a run ended as it should; without the cache of blocks, of which one line tells, files' pages may exceed the budget."""
    spare = 0 if compiler else 16 * MIB
    if answer["exit_code"] == 0:
        return bool(answer["peak_bytes"] <= answer["budget_bytes"] + spare)
    return answer["exit_code"] == 3 and "Traceback" not in answer["said"] and answer["lines"] == 1


def main() -> None:
    """Parse the command line, run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=int, default=100)
    parser.add_argument("--no_compiler", action="store_true", help="without the cache of blocks")
    flags = parser.parse_args()
    results = json.loads(flags.out.read_text()) if flags.out.exists() else {"machine": describe_machine(), "shape": SHAPE, "answers": {}}
    with tempfile.TemporaryDirectory(prefix="lowmem-budgets-") as name:
        folder = Path(name)
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs away from it\n" * 20000)
        if "need_bytes" not in results:
            small = {"train.micro_batch_size": 1, "train.global_batch_size": 8}
            results["base_bytes"] = run(folder, "base", small, not flags.no_compiler)["peak_bytes"]
            results["need_bytes"] = run(folder, "need", {}, not flags.no_compiler)["peak_bytes"]
        base, need = results["base_bytes"] - 100 * MIB, results["need_bytes"]  # from below the base on: those must end in order too
        for number in sorted(range(flags.budgets), key=lambda number: number * STRIDE % flags.budgets):
            budget = round(base + (need - base) * number / flags.budgets)
            if str(number) in results["answers"]:
                continue
            answer = run(folder, f"run-{number}", {"budget.ram": f"{budget}B"}, not flags.no_compiler)
            answer["budget_bytes"] = budget
            answer["in_order"] = in_order(answer, not flags.no_compiler)
            results["answers"][str(number)] = answer
            flags.out.write_text(json.dumps(results, indent=1) + "\n")
            verdict = "" if answer["in_order"] else ", not in order"
            print(f"{budget / MIB:.1f} MiB: {answer['exit_code']}{verdict}", file=sys.stderr, flush=True)
    codes = collections.Counter(answer["exit_code"] for answer in results["answers"].values())
    wrong = [number for number, answer in results["answers"].items() if not answer["in_order"]]
    print(f"exit codes: {dict(codes)}; not in order: {wrong or 'none'}")


if __name__ == "__main__":
    main()
