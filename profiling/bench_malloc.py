"""Training steps with large freed blocks kept (lowmem), given back at once, and left to glibc: speed and peak resident memory, in one run.

    python profiling/bench_malloc.py --out profiling/results     # some minutes on two cores; writes bench_malloc.json

kept: fixed thresholds and the cache of large blocks. fixed: the thresholds alone. free: glibc's own. Every setting runs in fresh processes,
all three in turn; a ratio to free is taken within a round, and its median, smallest and largest over the rounds are given.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import describe_machine

KINDS = ("kept", "fixed", "free")
SHARED = ["train.precision=bf16", "train.weight_dtype=bf16", "optim.state_bits=4", "data.seq_len=512", "train.steps=1"]
LARGE = ["model.dim=1024", "model.hidden_dim=2688", "model.num_layers=12", "model.num_heads=16", "model.vocab_size=32000"]
DEMO = ["model.dim=256", "model.num_layers=4", "model.num_heads=4", "model.vocab_size=4096", "model.tie_embeddings=true"]
SMALL = ["model.dim=256", "model.num_layers=4", "model.vocab_size=4096"]
SETTINGS = {
    "215M, layerwise, 4 x 512 by 2": [
        *LARGE, "train.update=layerwise", "train.activation_checkpointing=block", "train.global_batch_size=4", "train.micro_batch_size=2",
    ],
    "215M, accumulate, 4 x 512": [*LARGE, "train.global_batch_size=4", "train.micro_batch_size=4"],
    "4M, accumulate, 32 x 128, fp32 states (demo.yaml)": [
        *DEMO, "train.weight_dtype=fp32", "optim.state_bits=32", "data.seq_len=128",
        "train.global_batch_size=32", "train.micro_batch_size=32",
    ],
    "4M, accumulate, 16 x 512": [*SMALL, "train.global_batch_size=16", "train.micro_batch_size=16"],
}  # fmt: skip
STEPS = """
import json, sys, time, torch
import numpy as np
from lowmem.config.schema import resolve_micro_batch_size
from lowmem.config.load import load_run_config
from lowmem.data.batch import Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.system.files import compiled_root
from lowmem.memory.allocator import release_host_memory, set_up_host_memory
from lowmem.memory.allocator import fix_malloc_thresholds
from lowmem.memory.measure import measure_peak

if sys.argv[1] == "fixed":
    assert fix_malloc_thresholds()
if sys.argv[1] == "kept":
    assert not set_up_host_memory(compiled_root())
config = load_run_config(overrides=sys.argv[3:])
config.model.max_seq_len = config.max_seq_len()
with measure_peak() as peak:
    model = build_configured_model(config)
    engine = build_local_engine(config, model, torch.device("cpu"), "bf16", resolve_micro_batch_size(config, 1))
    if sys.argv[1] != "free":
        release_host_memory()
    shape = config.train.global_batch_size, config.data.seq_len + 1
    batch = Batch.from_windows(np.random.default_rng(0).integers(0, config.model.vocab_size, shape))
    seconds = []
    for _ in range(int(sys.argv[2])):
        began = time.perf_counter()
        engine.step(batch, 1e-3)
        seconds.append(time.perf_counter() - began)
print(json.dumps({"step_s": sorted(seconds[1:])[len(seconds[1:]) // 2], "host_peak_bytes": peak.host_peak_bytes}))
"""


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps per process, the first one not timed")
    parser.add_argument("--out", type=Path, help="folder for bench_malloc.json")
    arguments = parser.parse_args()
    rows = {}
    for name, settings in SETTINGS.items():
        rounds = []
        for _ in range(arguments.rounds):
            rounds.append({kind: run(kind, arguments.steps, [*SHARED, *settings]) for kind in KINDS})
        rows[name] = {
            kind: {
                "speed_ratio": ratios([r["free"]["step_s"] / r[kind]["step_s"] for r in rounds]),
                "memory_ratio": ratios([r[kind]["host_peak_bytes"] / r["free"]["host_peak_bytes"] for r in rounds]),
                "peak_mb": [round(r[kind]["host_peak_bytes"] / 1e6) for r in rounds],
            }
            for kind in KINDS
        }
        print(name, json.dumps(rows[name]), flush=True)
    if arguments.out:
        (arguments.out / "bench_malloc.json").write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


def ratios(values: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(f(values), 3) for f in (statistics.median, min, max)]


def run(kind: str, steps: int, settings: list[str]) -> dict:
    """One process."""
    result = subprocess.run([sys.executable, "-c", STEPS, kind, str(steps), *settings], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


if __name__ == "__main__":
    main()
