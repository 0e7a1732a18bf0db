"""Where the time of one training step goes, by operator: `bench_step.py`'s step under PyTorch's profiler.

    python profiling/profile_step.py --shape 215m --out profiling/results

The plain products of the step (same shapes, nothing around them) are timed in the same process as the roof to compare with.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from bench_step import SHAPES, lowmem_step
from machine import describe_machine

ROWS = 16


def main() -> None:
    """Warm up, time, profile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="215m", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for profile_step_SHAPE.json")
    options = parser.parse_args()
    setting = {"shape": options.shape, "weights": "bf16", "batch": options.batch, "checkpointing": "selective"}
    step, tokens = lowmem_step(setting)
    times = [timed(step) for _ in range(4)][1:]
    rows = profile(step)
    roof_s = sum(product_seconds(*shape, tokens) * count for shape, count in products(SHAPES[options.shape]).items())
    result = {
        "machine": describe_machine(),
        "setting": setting,
        "step_s": round(statistics.median(times), 3),
        "products_alone_s": round(roof_s, 3),
        "products_share": round(roof_s / statistics.median(times), 3),
        "operators": rows,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        (options.out / f"profile_step_{options.shape}.json").write_text(json.dumps(result, indent=1) + "\n")


def timed(function) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def profile(step) -> list[dict]:
    """Self time by operator, longest first, as a share of the step."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [{"operator": event.key, "share": round(event.self_cpu_time_total / total, 4), "calls": event.count} for event in events[:ROWS]]


def products(shape: dict) -> dict[tuple[int, int], int]:
    """(in, out) of every linear layer, and how often it occurs in the model."""
    dim, hidden, layers = shape["dim"], shape["hidden_dim"], shape["num_layers"]
    return {(dim, 3 * dim): layers, (dim, dim): layers, (dim, 2 * hidden): layers, (hidden, dim): layers, (dim, shape["vocab_size"]): 1}


def product_seconds(width_in: int, width_out: int, tokens: int) -> float:
    """Forward and both backward products of one linear layer in bf16; best of three."""
    import torch

    x, weight, grad = (torch.randn(*size).bfloat16() for size in ((tokens, width_in), (width_out, width_in), (tokens, width_out)))
    return min(timed(lambda: (x @ weight.t(), grad @ weight, grad.t() @ x)) for _ in range(3))


if __name__ == "__main__":
    main()
