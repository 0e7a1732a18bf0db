"""What a run did, as JSON to commit: its validation losses, speed by phase and length, peak memory, and what it answers.

python profiling/record_run.py runs/chat --ask "What is the capital of France?" --out profiling/results/pretrain_then_chat.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from profiling.machine import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--ask", nargs="*", default=[])
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in (Path(arguments.run) / "metrics.jsonl").read_text().splitlines()]
    speeds: dict[str, list[float]] = {}
    for line in lines:
        if "loss" in line:
            speeds.setdefault(f"{line.get('phase', 'text')}, {line['seq_len']} tokens", []).append(line["tokens_per_s"])
    answers = {}
    for question in arguments.ask:
        options = ["--chat", "--prompt", question, "--preset", "balanced", "--max_new_tokens", "60", "--seed", "1"]
        command = [sys.executable, "-m", "lowmem", "generate", "--run", arguments.run, *options]
        answers[question] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    report = {
        "machine": describe_machine(),
        "val_loss": {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line},
        "median_tokens_per_s": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        "host_peak_bytes": json.loads((Path(arguments.run) / "memory.json").read_text())["measured"]["host_peak_bytes"],
        "answers": answers,
    }
    Path(arguments.out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
