"""Narrow optimizer states on quadratics: the error they end with, divided by that of 32-bit states.

    python profiling/quadratics.py --out profiling/results/quadratics.json   # a minute on one core

4,096 elements in blocks of 128. Varied are the spread of curvatures (decades), whether one element of each block has ten times the largest
curvature, how the learning rate falls, its size, and the noise of the gradients. Without noise 32-bit states may end at the minimum to the
last bit, where a ratio says nothing: the errors stand beside it.
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import nn

from lowmem.optim import AdamW, Lion
from lowmem.optim.low_bit import LowBitOptimizer

BLOCKS, BLOCK, STEPS, LAST = 32, 128, 1000, 100
SCHEDULES = {
    "constant": lambda part: 1.0,
    "cosine to a tenth": lambda part: 0.1 + 0.45 * (1 + math.cos(math.pi * part)),
    "cosine to 0": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
}
STATES: dict[str, tuple[type[LowBitOptimizer], int, tuple[float, float], float]] = {
    "AdamW, 8 bits": (AdamW, 8, (0.9, 0.95), 0.01),
    "AdamW, 4 bits": (AdamW, 4, (0.9, 0.95), 0.01),
    "AdamW, 4 bits, lr 0.003": (AdamW, 4, (0.9, 0.95), 0.003),
    "AdamW, 4 bits, lr 0.03": (AdamW, 4, (0.9, 0.95), 0.03),
    "AdamW, 4 bits, beta2 0.999": (AdamW, 4, (0.9, 0.999), 0.01),
    "Lion, 8 bits": (Lion, 8, (0.9, 0.99), 0.005),
}
SPECTRA = {"one decade, one large": (1, True), "one decade": (1, False), "two decades, one large": (2, True), "equal": (0, False)}
NOISES = (0.0, 0.3)
SEEDS = (0, 1)


def final_error(states: str, bits: int, spectrum: str, schedule: str, noise: float, seed: int) -> float:
    """Distance from the minimum, the mean of the last steps."""
    kind, _, betas, lr = STATES[states]
    decades, large = SPECTRA[spectrum]
    random = torch.Generator().manual_seed(seed)
    curvature = 10.0 ** (-decades * torch.rand(BLOCKS, BLOCK, generator=random))
    if large:
        curvature[:, 0] = 10.0
    weight = nn.Parameter(torch.randn(BLOCKS, BLOCK, generator=random))
    optimizer = kind([weight], lr=lr, weight_decay=0.0, state_bits=bits, seed=seed, betas=betas)  # type: ignore[call-arg]
    errors = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * SCHEDULES[schedule](step / STEPS)
        weight.grad = curvature * weight.detach() + noise * torch.randn(BLOCKS, BLOCK, generator=random)
        optimizer.step()
        if step >= STEPS - LAST:
            errors.append(weight.detach().norm().item())
    return statistics.mean(errors)


def compare(states: str, spectrum: str, schedule: str, noise: float) -> dict[str, Any]:
    """Errors of narrow and of 32-bit states, means over the seeds, and the mean of their ratios."""
    narrow = [final_error(states, STATES[states][1], spectrum, schedule, noise, seed) for seed in SEEDS]
    wide = [final_error(states, 32, spectrum, schedule, noise, seed) for seed in SEEDS]
    ratio = statistics.mean(one / other for one, other in zip(narrow, wide, strict=True))
    return {"ratio": round(ratio, 3), "error": statistics.mean(narrow), "error_32_bits": statistics.mean(wide)}


def main() -> None:
    """Parse the command line, compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    rows, summary = {}, {}
    for states, noise in itertools.product(STATES, NOISES):
        ratios = []
        for spectrum, schedule in itertools.product(SPECTRA, SCHEDULES):
            row = compare(states, spectrum, schedule, noise)
            rows[f"{states}; noise {noise}; {spectrum}; {schedule}"] = row
            ratios.append(row["ratio"])
        summary[f"{states}; noise {noise}"] = {"median": statistics.median(ratios), "largest": max(ratios)}
        print(f"{states}; noise {noise}: median {statistics.median(ratios):.3f}, largest {max(ratios):.3f}", flush=True)
    if flags.out:
        flags.out.write_text(json.dumps({"machine": describe_machine(), "summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
