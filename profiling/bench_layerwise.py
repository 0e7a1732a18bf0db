"""The 215M shape with low-bit states and layerwise updates against Hugging Face's Llama: tokens/s and peak resident memory, in one run.

    python profiling/bench_layerwise.py --out profiling/results     # about a quarter of an hour on two cores; writes bench_layerwise.json

Every setting runs in a fresh process, all of them in each of `--rounds` rounds; a ratio is the median over rounds of tokens/s, or of
peak memory, against another setting's of the same round. Steps as in `bench_step.py`.
"""

import argparse
import json
import statistics
from pathlib import Path

from bench_step import SHAPES, run
from machine import describe_machine

HF, LOWMEM = {"side": "hf", "shape": "215m", "weights": "bf16", "autocast": False}, {"side": "lowmem", "shape": "215m", "weights": "bf16"}
LAYERWISE = {**LOWMEM, "update": "layerwise", "checkpointing": "block"}
SETTINGS = {
    "HF, AdamW8bit, checkpointing, 1 x 512": {**HF, "batch": 1, "state_bits": 8, "checkpointing": True},
    "HF, fused AdamW, 1 x 512": {**HF, "batch": 1},
    "HF, fused AdamW, 4 x 512": {**HF, "batch": 4},
    "HF, fused AdamW, compiled, 4 x 512": {**HF, "batch": 4, "compile": True},
    "lowmem, 4-bit, layerwise, 1 x 512": {**LAYERWISE, "batch": 1, "state_bits": 4},
    "lowmem, 8-bit, layerwise, 1 x 512": {**LAYERWISE, "batch": 1, "state_bits": 8},
    "lowmem, 4-bit, layerwise, 16 x 512 by 4": {**LAYERWISE, "batch": 16, "micro": 4, "state_bits": 4},
    "lowmem, 4-bit, accumulate, 4 x 512": {**LOWMEM, "batch": 4, "state_bits": 4, "checkpointing": "selective"},
}
PAIRS = {
    "lowmem, 4-bit, layerwise, 1 x 512": "HF, AdamW8bit, checkpointing, 1 x 512",
    "lowmem, 8-bit, layerwise, 1 x 512": "HF, AdamW8bit, checkpointing, 1 x 512",
    "lowmem, 4-bit, layerwise, 16 x 512 by 4": "HF, fused AdamW, 4 x 512",
    "lowmem, 4-bit, accumulate, 4 x 512": "HF, fused AdamW, 4 x 512",
}
COMPILED = "HF, fused AdamW, compiled, 4 x 512"


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--out", type=Path, help="folder for bench_layerwise.json")
    arguments = parser.parse_args()
    chosen = {name: setting for name, setting in SETTINGS.items() if arguments.only in name}
    rounds = [{name: run({**setting, "steps": arguments.steps}) for name, setting in chosen.items()} for _ in range(arguments.rounds)]
    result = {"machine": describe_machine(), "shape": SHAPES["215m"], "summary": summary(rounds), "rounds": rounds}
    print(json.dumps(result["summary"], indent=1))
    if arguments.out:
        (arguments.out / "bench_layerwise.json").write_text(json.dumps(result, indent=1) + "\n")


def summary(rounds: list[dict]) -> dict:
    """Medians of every setting, and of its ratios to the setting it is compared with."""
    table = {}
    for name in rounds[0]:
        row = {
            "tokens_per_s": round(statistics.median(r[name]["tokens_per_s"] for r in rounds), 1),
            "host_peak_mb": round(max(r[name]["host_peak_bytes"] for r in rounds) / 1e6),
        }
        for label, other in (("", PAIRS.get(name)), ("_compiled", COMPILED if "lowmem" in name else None)):
            if other in rounds[0]:
                for what, key in (("speed", "tokens_per_s"), ("memory", "host_peak_bytes")):
                    ratios = [r[name][key] / r[other][key] for r in rounds]
                    row[f"{what}_ratio{label}"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        table[name] = row
    return table


if __name__ == "__main__":
    main()
