"""Forward and backward of low-rank feed-forward stacks against dense ones and against the published layer, and the peak memory of each.

    python profiling/bench_lorpt.py --out profiling/results      # some minutes on two cores; writes bench_lorpt.json

The three stacks of the published benchmark (FlameF0X/Low-Rank-Pretraining, README), four layers each, 2,048 tokens, fp32: every layer is a
linear map up, GELU, a linear map down. `published` builds the product on every forward, as the published layer does. Times are of one
process that runs the three kinds in turn; ratios are taken within a round. Memory is of fresh processes: the peak above what the
process took before the model was made.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

STACKS = {
    "512/2048, rank 64": {"dim": 512, "hidden": 2048, "rank": 64, "batch": 16, "seq_len": 128},
    "1024/4096, rank 128": {"dim": 1024, "hidden": 4096, "rank": 128, "batch": 8, "seq_len": 256},
    "2048/8192, rank 128": {"dim": 2048, "hidden": 8192, "rank": 128, "batch": 4, "seq_len": 512},
}
KINDS = ("dense", "published", "lowmem")
NUM_LAYERS = 4
GOALS = (3, 4, 6)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float32 is the published setting")
    parser.add_argument("--out", type=Path, help="folder for bench_lorpt.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        request = json.loads(arguments.child)
        print(json.dumps(peak(request) if "kind" in request else times(request)))
        return
    rows = {}
    for dtype in arguments.dtypes:
        for (name, stack), goal in zip(STACKS.items(), GOALS, strict=True):
            timed = child({**stack, "rounds": arguments.rounds, "dtype": dtype})
            memory = {kind: child({**stack, "kind": kind, "dtype": dtype})["peak_mb"] for kind in KINDS}
            rows[f"{name}, {dtype}"] = {**timed, "peak_mb": memory, "goal": goal}
            print(name, dtype, json.dumps(rows[f"{name}, {dtype}"]), flush=True)
    if arguments.out:
        from machine import describe_machine

        document = {"machine": describe_machine(), "layers": NUM_LAYERS, "rows": rows}
        (arguments.out / "bench_lorpt.json").write_text(json.dumps(document, indent=1) + "\n")


def child(request: dict) -> dict:
    """In a process of its own."""
    result = subprocess.run([sys.executable, __file__, "--child", json.dumps(request)], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def make_stack(kind: str, stack: dict):  # type: ignore[no-untyped-def]
    """Four layers of `dim` -> `hidden` -> `dim`."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from lowmem.nn.lorpt import LoRPtLinear

    class Published(nn.Module):
        """The product of both factors, built again on every forward."""

        def __init__(self, in_features: int, out_features: int):
            super().__init__()
            self.left = nn.Parameter(0.02 * torch.randn(out_features, stack["rank"]))
            self.right = nn.Parameter(0.02 * torch.randn(stack["rank"], in_features))
            self.bias = nn.Parameter(torch.zeros(out_features))

        def forward(self, x):  # type: ignore[no-untyped-def]
            return F.linear(x, self.left @ self.right, self.bias)

    makers = {
        "dense": nn.Linear,
        "published": Published,
        "lowmem": lambda in_features, out_features: LoRPtLinear(in_features, out_features, stack["rank"]),
    }
    make, layers = makers[kind], []
    for _ in range(NUM_LAYERS):
        layers += [make(stack["dim"], stack["hidden"]), nn.GELU(), make(stack["hidden"], stack["dim"])]
    return nn.Sequential(*layers).to(getattr(torch, stack["dtype"]))


def run_once(model, x) -> float:  # type: ignore[no-untyped-def]
    """Seconds of one forward and backward; gradients are dropped afterwards."""
    started = time.perf_counter()
    model(x).sum().backward()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


def prepare(stack: dict):  # type: ignore[no-untyped-def]
    """Memory and input."""
    import torch

    from lowmem.memory.allocator import set_up_host_memory
    from lowmem.system.files import compiled_root

    set_up_host_memory(compiled_root())  # for all kinds alike: else the dense stack pays for its page faults
    torch.manual_seed(0)
    return torch.randn(stack["batch"], stack["seq_len"], stack["dim"], dtype=getattr(torch, stack["dtype"])).requires_grad_()


def times(stack: dict) -> dict:
    """In the child: each kind in turn; speed relative to dense."""
    x = prepare(stack)
    models = {kind: make_stack(kind, stack) for kind in KINDS}
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(stack["rounds"] + 1):
        for kind, model in models.items():
            taken[kind].append(run_once(model, x))
    rounds = {kind: seconds[1:] for kind, seconds in taken.items()}
    speed = {kind: [dense / own for dense, own in zip(rounds["dense"], seconds, strict=True)] for kind, seconds in rounds.items()}
    return {
        "milliseconds": {kind: round(1000 * statistics.median(seconds), 1) for kind, seconds in rounds.items()},
        "speed_to_dense": {kind: [round(f(r), 2) for f in (statistics.median, min, max)] for kind, r in speed.items()},
        "parameters": {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()},
    }


def peak(stack: dict) -> dict:
    """In the child: three passes of one kind."""
    x = prepare(stack)
    from lowmem.memory.measure import host_rss_bytes, measure_peak

    before = host_rss_bytes()
    with measure_peak() as measured:
        model = make_stack(stack["kind"], stack)
        for _ in range(3):
            run_once(model, x)
    return {"peak_mb": round((measured.host_peak_bytes - before) / 1e6, 1)}


if __name__ == "__main__":
    main()
