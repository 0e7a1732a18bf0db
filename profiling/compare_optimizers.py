"""Optimizer steps of this checkout against those of another one, in turn: what a change of the kernels costs.

    git worktree add --detach /tmp/before REVISION && (cd /tmp/before && python setup.py build_ext --inplace)
    python profiling/compare_optimizers.py --other /tmp/before --out profiling/results/compare_optimizers.json

Each round is a fresh process of each checkout; a ratio is this checkout's rate divided by the other's of the same round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from machine import describe_machine

ROOT = Path(__file__).parent.parent
SIZES = {"1M": 1 << 20, "16M": 1 << 24}
WIDTHS = [("AdamW", 32), ("AdamW", 8), ("AdamW", 4), ("Lion", 32), ("Lion", 8)]
ROWS = [(label, size, kind, bits, dtype) for label, size in SIZES.items() for kind, bits in WIDTHS for dtype in ("float32", "bfloat16")]
CHILD = """
import json, statistics, sys, time
import torch, lowmem
from lowmem import optim
root, rows = sys.argv[1], json.loads(sys.argv[2])
assert lowmem.__file__.startswith(root), lowmem.__file__
torch.set_num_threads(2)
rates = []
for _, size, kind, bits, dtype in rows:
    weight = torch.nn.Parameter(torch.randn(size // 1024, 1024).to(getattr(torch, dtype)))
    weight.grad = torch.randn_like(weight)
    optimizer = getattr(optim, kind)([weight], lr=1e-3, state_bits=bits)
    optimizer.step()
    seconds = []
    for _ in range(max(7, (1 << 26) // size)):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    rates.append(size / statistics.median(seconds) / 1e6)
print(json.dumps(rates))
"""


def rates(root: Path) -> list[float]:
    """Millions of parameters a second of the checkout at `root`, by row, from a process of its own."""
    # -S: an editable installation would put this checkout before the other one
    path = os.pathsep.join([str(root), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    command = [sys.executable, "-S", "-c", CHILD, str(root), json.dumps(ROWS)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=root)
    if result.returncode:
        raise SystemExit(f"{root}: {result.stderr[-2000:]}")
    return json.loads(result.stdout)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    other = flags.other.resolve()
    if not (other / "lowmem" / "optim").is_dir():
        parser.error(f"--other is {flags.other}, which is no checkout of lowmem")
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=other, capture_output=True, text=True, check=True)
    rounds = []
    for number in range(flags.rounds):
        found = {root: rates(root) for root in (ROOT, other)[:: 1 if number % 2 else -1]}
        rounds.append(list(zip(found[ROOT], found[other], strict=True)))
    table = {}
    for index, (label, _, kind, bits, dtype) in enumerate(ROWS):
        ratio = statistics.median(one[index][0] / one[index][1] for one in rounds)
        rate = statistics.median(one[index][0] for one in rounds)
        name = f"{label}, {kind}, {bits} bits, {dtype} weights"
        table[name] = {"ratio": round(ratio, 3), "mparams_per_s": round(rate, 1)}
        print(f"{name}: {ratio:.3f}, {rate:.0f} M/s", flush=True)
    if flags.out:
        document = {"machine": describe_machine(), "other": revision.stdout.strip(), "rows": table}
        flags.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
