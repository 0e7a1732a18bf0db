"""What keeping the documents of a window apart costs: training steps with and without segments, in turn, on the same windows.

    python profiling/bench_document_mask.py --out profiling/results/bench_document_mask.json   # five minutes on two cores

For each shape and precision: the median over rounds of the time with segments divided by the time without, both taken in one round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine

from lowmem.config.load import load_run_config
from lowmem.config.schema import resolve_micro_batch_size
from lowmem.data.batch import Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.planning.predict import resolve_without_data

ROOT = Path(__file__).parent.parent
DOCUMENT_TOKENS = 300  # on average
SHAPES = {
    "demo": ["configs/cpu/demo.yaml"],
    "demo, fp32": ["configs/cpu/demo.yaml", "train.precision=fp32"],
    "width 512, heads of 64, 1,024 tokens": ["configs/cpu/demo.yaml", "model.dim=512", "model.num_heads=8", "data.seq_len=1024"],
    "215M, layerwise": ["configs/cpu/llama_215m.yaml", "train.global_batch_size=4", "train.micro_batch_size=4"],
}


def measure(config_file: str, *settings: str, rounds: int) -> dict[str, Any]:
    """One shape: the ratio of each round, and the median seconds of a step without segments."""
    config = resolve_without_data(load_run_config(ROOT / config_file, list(settings)))
    model = build_configured_model(config)
    assert config.train.precision != "auto"
    engine = build_local_engine(config, model, torch.device("cpu"), config.train.precision, resolve_micro_batch_size(config, 1))
    random = np.random.default_rng(0)
    windows = random.integers(1, model.vocab_size, (config.train.global_batch_size, config.data.seq_len + 1))
    windows[random.random(windows.shape) < 1 / DOCUMENT_TOKENS] = 0
    batches = {"with": Batch.from_windows(windows, 0), "without": Batch.from_windows(windows)}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(rounds + 1):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            start = time.perf_counter()
            engine.step(batches[name], 1e-4)
            seconds[name].append(time.perf_counter() - start)
    ratios = [one / other for one, other in zip(seconds["with"][1:], seconds["without"][1:], strict=True)]  # the first round warms up
    return {"ratio": statistics.median(ratios), "ratios": sorted(ratios), "seconds_without": statistics.median(seconds["without"][1:])}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    rows = {}
    for name, (config_file, *settings) in SHAPES.items():
        rows[name] = measure(config_file, *settings, rounds=flags.rounds)
        print(f"{name}: {rows[name]['ratio']:.3f}", flush=True)
    if flags.out:
        result = {"machine": describe_machine(), "document_tokens": DOCUMENT_TOKENS, "rows": rows}
        flags.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
