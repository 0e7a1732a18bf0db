"""Host memory of optimizer states under ZeRO-2 with offload, and the time of the update, by optimizer; one rank, no GPU needed.

    python profiling/bench_offload.py --out profiling/results         # about three minutes on two cores; writes bench_offload.json
    python profiling/bench_offload.py --shape tiny --rounds 1         # a quick look

Each measurement is a fresh process that trains a decoder through lowmem's DeepSpeed engine with bf16 weights: one step to measure
memory, then timed steps. Bytes per parameter are reported twice: counted from the tensors of the states, and as the growth of this
process's resident memory while the states are made and the first update runs. Every round measures all optimizers one after the
other; a ratio is the median over rounds of an optimizer's median time against DeepSpeedCPUAdam's of the same round.
DeepSpeed's operators are compiled first if they are not yet (see `make deepspeed-ops`).
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
from typing import Any

SHAPES = {
    "30m": {"dim": 512, "num_layers": 7, "num_heads": 8, "vocab_size": 8192},
    "tiny": {"dim": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512},
}
SEQ_LEN, BATCH = 64, 1  # few tokens: forward and backward are not what is measured
BASELINE = "DeepSpeedCPUAdam"
OPTIMIZERS = {
    BASELINE: {"name": "adamw"},
    "DeepSpeedCPULion": {"name": "lion"},
    "bitsandbytes AdamW8bit": {"name": "adamw", "state_bits": 8, "backend": "bitsandbytes"},
    "lowmem AdamW, 8 bits": {"name": "adamw", "state_bits": 8},
    "lowmem AdamW, 4 bits": {"name": "adamw", "state_bits": 4},
    "lowmem Lion, 8 bits": {"name": "lion", "state_bits": 8},
}


def main() -> None:
    """Parse the command line, measure, print and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30m", choices=[*SHAPES])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="timed steps per process")
    parser.add_argument("--out", type=Path, help="folder for bench_offload.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    result = compare(arguments)
    print(json.dumps(result["summary"], indent=1))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench_offload.json").write_text(json.dumps(result, indent=1) + "\n")


def compare(arguments: argparse.Namespace) -> dict:
    """All optimizers in every round."""
    from machine import describe_machine

    from lowmem.engine.deepspeed.operators import build_deepspeed_ops

    build_deepspeed_ops(report=lambda line: print(line, file=sys.stderr))
    rounds = [
        {name: run({"name": name, "shape": arguments.shape, "steps": arguments.steps}) for name in OPTIMIZERS}
        for _ in range(arguments.rounds)
    ]
    summary: dict[str, Any] = {}
    for name in OPTIMIZERS:
        rows = [one[name] for one in rounds]
        count = rows[0]["parameters"]
        summary[name] = {
            "state_bytes_per_parameter": round(rows[0]["components"]["optimizer_states"] / count, 3),
            "resident_bytes_per_parameter": round(statistics.median(row["resident_growth_bytes"] / count for row in rows), 3),
            "peak_bytes_per_parameter": round(statistics.median(row["peak_growth_bytes"] / count for row in rows), 3),
        }
        for kind in ("update", "step"):
            ratios = [one[name][f"{kind}_s"] / one[BASELINE][f"{kind}_s"] for one in rounds]
            summary[name][f"{kind}_time_ratio"] = round(statistics.median(ratios), 3)
            summary[name][f"{kind}_time_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    shape = {**SHAPES[arguments.shape], "seq_len": SEQ_LEN, "batch": BATCH, "parameters": rounds[0][BASELINE]["parameters"]}
    return {"machine": describe_machine(), "shape": shape, "summary": summary, "rounds": rounds}


def run(setting: dict) -> dict:
    """One measurement in a fresh process."""
    # Allocations above 64 KiB are mapped and returned one by one: states are then new resident memory, not pages that the
    # backward pass left free.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--child", json.dumps(setting)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
    row = json.loads(result.stdout.splitlines()[-1])
    states, grown = row["components"]["optimizer_states"] / row["parameters"], row["resident_growth_bytes"] / row["parameters"]
    print(f"{states:6.3f} counted {grown:6.3f} resident, update {1000 * row['update_s']:7.1f} ms  {setting['name']}", file=sys.stderr)
    return row


def measure(setting: dict) -> dict:
    """In the child: build, one step for memory, timed steps.

    Returns:
        parameters: numbers of the model, all of them in this rank's partition.
        components: bytes by component, counted from tensors.
        resident_growth_bytes, peak_growth_bytes: of this process while the states are made and first used; at the end, and at most.
        update_s, step_s: median seconds in the optimizer, and in the whole training step.
    """
    import numpy as np
    import torch

    from lowmem.data.batch import Batch

    watch = Watch()
    engine = build_engine(setting, watch)
    windows = np.random.default_rng(0).integers(SHAPES[setting["shape"]]["vocab_size"], size=(BATCH, SEQ_LEN + 1))
    batch = Batch.from_windows(windows)
    losses = [engine.step(batch, lr=1e-4).loss]
    watch.measures_memory = False
    updates, steps = [], []
    for _ in range(setting["steps"]):
        watch.update_s, started = 0.0, time.perf_counter()
        losses.append(engine.step(batch, lr=1e-4).loss)
        steps.append(time.perf_counter() - started)
        updates.append(watch.update_s)
    found = {
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "components": engine.memory_components(),
        "resident_growth_bytes": watch.resident_growth_bytes,
        "peak_growth_bytes": watch.peak_growth_bytes,
        "update_s": statistics.median(updates),
        "step_s": statistics.median(steps),
        "threads": torch.get_num_threads(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    engine.close()
    return found


class Watch:
    """Resident memory and time of the calls it wraps.

    Attributes:
        measures_memory: set false before timing.
        update_s: seconds in wrapped calls since it was set to 0.
    """

    def __init__(self) -> None:
        self.measures_memory = True
        self.resident_growth_bytes = self.peak_growth_bytes = 0
        self.update_s = 0.0

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        from lowmem.memory.host import own_memory
        from lowmem.memory.measure import measure_peak

        def watched(*arguments: Any, **named: Any) -> Any:
            if not self.measures_memory:
                started = time.perf_counter()
                result = call(*arguments, **named)
                self.update_s += time.perf_counter() - started
                return result
            before, _ = own_memory()
            with measure_peak() as peak:
                result = call(*arguments, **named)
            peak_growth = self.resident_growth_bytes + peak.host_peak_bytes - before
            self.resident_growth_bytes += own_memory()[0] - before
            self.peak_growth_bytes = max(self.peak_growth_bytes, peak_growth, self.resident_growth_bytes)
            return result

        return watched


def build_engine(setting: dict, watch: Watch) -> Any:
    """lowmem's DeepSpeed engine, its optimizer's step and what allocates states before it under watch."""
    import torch

    from lowmem.config.schema import EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
    from lowmem.engine.deepspeed import engine
    from lowmem.models.registry import build_model

    prepare = engine.prepare_optimizer

    def prepare_watched(ds_engine: Any, optimizer: Any) -> None:
        watch(prepare)(ds_engine, optimizer)
        optimizer.step = watch(optimizer.step)

    engine.prepare_optimizer = prepare_watched
    config = RunConfig(
        model=ModelConfig(**SHAPES[setting["shape"]]),
        optim=OptimConfig(**OPTIMIZERS[setting["name"]]),
        train=TrainConfig(global_batch_size=BATCH, micro_batch_size=BATCH, precision="bf16"),
        engine=EngineConfig(name="deepspeed", zero_stage=2, offload="cpu"),
    )
    model = build_model(config.model, vocab_size=config.model.vocab_size, max_seq_len=SEQ_LEN, seed=0)
    return engine.DeepSpeedEngine(model, config, device=torch.device("cpu"), micro_batch_size=BATCH)


if __name__ == "__main__":
    main()
