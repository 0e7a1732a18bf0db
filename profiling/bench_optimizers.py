"""Optimizer steps: millions of parameters a second against torch, bitsandbytes, torchao and lion-pytorch, in one run.

    python profiling/bench_optimizers.py --out profiling/results       # about eight minutes on two cores; writes bench_optimizers.json
    python profiling/bench_optimizers.py --device cuda --out DIR       # the same on a GPU
    pip install '.[bench]'                                             # brings bitsandbytes and torchao

Each size and instruction set is a fresh process, in which all optimizers update their own copy of the same parameters in turn; a ratio
is the median over rounds of an optimizer's rate against torch's fused fp32 AdamW of the same round. Bytes moved are those a step has to
read and write; their share is of what `copy_` of 256 MB moves in the same process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SIZES = {"1M": 1 << 20, "16M": 1 << 24, "200M": 200 << 20}
BASELINE = "torch AdamW, fused"
RIVALS = {  # other narrow states on the same weights
    "lowmem AdamW, 8-bit, float32 weights": "bitsandbytes AdamW8bit",
    "lowmem AdamW, 4-bit, float32 weights": "torchao AdamW4bit",
    "lowmem Lion, 8-bit, float32 weights": "bitsandbytes Lion8bit",
}
SLOW = ("torchao", "bitsandbytes")  # one round at the largest size
TENSOR = 1 << 24  # larger models are several tensors


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="folder for bench_optimizers.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    from machine import describe_machine

    tables = {}
    for size in arguments.sizes:
        for isa in ("avx512", "avx2") if arguments.device == "cpu" else ("cuda",):
            setting = {"size": size, "isa": isa, "rounds": arguments.rounds, "device": arguments.device}
            tables[f"{size}, {isa}"] = child(setting)
            print_table(f"{size}, {isa}", tables[f"{size}, {isa}"])
    if arguments.out:
        document = {"machine": describe_machine(), "tables": tables}
        (arguments.out / "bench_optimizers.json").write_text(json.dumps(document, indent=1) + "\n")


def child(setting: dict) -> dict:
    """One table, in a fresh process."""
    environment = {**os.environ, "LOWMEM_CPU_ISA": setting["isa"]}
    command = [sys.executable, __file__, "--child", json.dumps(setting)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def print_table(title: str, table: dict) -> None:
    """For people."""
    print(f"\n{title}: copy {table['copy_gb_per_s']:.1f} GB/s; instructions in use: {table['instructions']}")
    for name, row in table["rows"].items():
        moved = f"{row['bytes_moved']:5.2f} B/param {100 * row['copy_share']:4.0f} % of copy" if row["bytes_moved"] else ""
        rival = f"  {row['ratio_to_rival']:.1f} x {RIVALS[name]}" if "ratio_to_rival" in row else ""
        print(f"  {name:40s} {row['mparams_per_s']:8.0f} M/s  {row['ratio_to_torch']:6.3f} x torch  {moved}{rival}", flush=True)


def optimizers(isa: str) -> dict[str, tuple]:
    """By name: the optimizer's class and settings, dtype of the weights, bytes a step moves per parameter (0: not worked out)."""
    import lion_pytorch
    import torch

    from lowmem.optim import AdamW, Lion

    fp32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, tuple] = {BASELINE: (torch.optim.AdamW, {"fused": True}, fp32, 28)}
    for cls, states in ((AdamW, 2), (Lion, 1)):
        for dtype, size in ((fp32, 4), (bf16, 2)):
            for bits in cls.widths:
                state_bytes = bits / 8 + (4 / 128 if bits < 32 else 0)
                name = f"lowmem {cls.__name__}, {bits}-bit, {str(dtype).removeprefix('torch.')} weights"
                found[name] = (cls, {"state_bits": bits}, dtype, 3 * size + 2 * states * state_bytes)
    if isa == "avx2":
        return found  # the libraries choose their instructions themselves
    found["lion-pytorch Lion"] = (lion_pytorch.Lion, {}, fp32, 20)
    import bitsandbytes
    import torchao.optim

    found["bitsandbytes AdamW8bit"] = (bitsandbytes.optim.AdamW8bit, {}, fp32, 0)
    found["bitsandbytes Lion8bit"] = (bitsandbytes.optim.Lion8bit, {}, fp32, 0)
    found["torchao AdamW8bit"] = (torchao.optim.AdamW8bit, {}, fp32, 0)
    found["torchao AdamW4bit"] = (torchao.optim.AdamW4bit, {}, fp32, 0)
    return found


def measure(setting: dict) -> dict:
    """In the child: every optimizer in every round."""
    import torch

    from lowmem.optim.kernels import cpu

    device, numel, chosen = setting["device"], SIZES[setting["size"]], optimizers(setting["isa"])
    repeats = max(1, (1 << 23) // numel)  # small sizes are too quick to time once
    large = numel > TENSOR
    steps = {name: make_step(*spec[:3], numel, device) for name, spec in chosen.items()} if not large else {}
    times: dict[str, list[float]] = {name: [] for name in chosen}
    copies = []
    source, target = torch.ones(1 << 26, device=device), torch.empty(1 << 26, device=device)
    target.copy_(source)
    for round_number in range(setting["rounds"] if not large else min(setting["rounds"], 3)):
        copies.append(clock(lambda: target.copy_(source), 1, device))
        for name, spec in chosen.items():
            if large and name.startswith(SLOW) and round_number:
                continue
            step = steps[name] if not large else make_step(*spec[:3], numel, device)  # all of them at once would not fit
            times[name].append(clock(step, repeats, device))
    bandwidth = 2 * source.numel() * 4 / statistics.median(copies)
    rows = {}
    for name, (_, _, _, moved) in chosen.items():
        rate = numel / statistics.median(times[name])
        rows[name] = {
            "mparams_per_s": round(rate / 1e6, 1),
            "ratio_to_torch": round(statistics.median(b / t for b, t in zip(times[BASELINE], times[name], strict=False)), 4),
            "bytes_moved": round(moved, 3),
            "copy_share": round(rate * moved / bandwidth, 3),
        }
    for name, other in RIVALS.items():
        if other in rows:
            pairs = zip(times[other], times[name], strict=False)
            rows[name]["ratio_to_rival"] = round(statistics.median(b / t for b, t in pairs), 1)
    return {
        "copy_gb_per_s": round(bandwidth / 1e9, 2),
        "instructions": cpu.ISAS[cpu.isa()] if device == "cpu" else device,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def make_step(cls: type, settings: dict, dtype, numel: int, device: str) -> Callable[[], object]:
    """A warmed-up step over parameters of `numel` numbers altogether."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    parameters = []
    for start in range(0, numel, TENSOR):
        count = min(TENSOR, numel - start)
        parameter = torch.nn.Parameter(torch.empty(count // 1024, 1024, device=device).normal_(0, 0.02, generator=generator).to(dtype))
        parameter.grad = torch.empty(count // 1024, 1024, device=device).normal_(0, 1e-3, generator=generator).to(dtype)
        parameters.append(parameter)
    optimizer = cls(parameters, lr=1e-4, **settings)
    for _ in range(2):
        optimizer.step()
    return optimizer.step


def clock(step: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of one step."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main()
