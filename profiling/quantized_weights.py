"""Pretraining with weights of 32, 16, 8 and 4 bits: losses at equal tokens, bytes and peak memory, and the time of a step. CPU.

    python profiling/quantized_weights.py --out profiling/results     # a quarter of an hour on two cores; writes quantized_weights.json
    python profiling/quantized_weights.py --steps 20 --parts losses   # a quick look

Parts, each of them replaced in the file:

    losses   every `train.weight_dtype` over the same text, order and initial weights, two seeds; two runs at once, one thread each
    memory   peak resident memory of `lowmem pretrain` in a fresh process, and what the planner predicted, at a shape of 83M parameters
    speed    steps of every variant in turn, in one process: the median ratio to bf16 over the rounds

Layerwise updates, 8-bit states, products in bf16; the text is the standard library's.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VARIANTS = ("fp32", "bf16", "int8", "int4")
SEEDS = (0, 1)
SMALL = {"dim": 256, "num_layers": 4, "num_heads": 4}
LARGE = {"dim": 768, "num_layers": 10, "num_heads": 12, "vocab_size": 8192}
COMMON = {
    "data.sources": "[{stdlib: true, max_bytes: 30000000}]", "train.update": "layerwise", "train.activation_checkpointing": "block",
    "train.precision": "bf16", "optim.state_bits": 8, "device": "cpu",
}  # fmt: skip
LOSSES = {
    **{f"model.{name}": value for name, value in SMALL.items()}, "data.seq_len": 64, "train.global_batch_size": 8,
    "data.tokenizer_vocab_size": 4096, "optim.lr": 2e-3, "optim.warmup_steps": 50,
}  # fmt: skip
MEMORY = {
    **{f"model.{name}": value for name, value in LARGE.items()}, "data.seq_len": 256, "train.global_batch_size": 2, "train.steps": 3,
    "data.tokenizer": "bytes", "data.sources": "[{stdlib: true, max_bytes: 3000000}]", "train.micro_batch_size": 1,
    "train.eval_every": 3, "train.eval_sequences": 2,
}  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["losses", "memory", "speed"])
    parser.add_argument("--steps", type=int, default=1000, help="of each run of `losses`")
    parser.add_argument("--rounds", type=int, default=9, help="of `speed`")
    parser.add_argument("--out", type=Path, help="folder of quantized_weights.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train(**json.loads(arguments.child))))
        return
    path = arguments.out and arguments.out / "quantized_weights.json"
    result = json.loads(path.read_text()) if path and path.exists() else {}
    parts = {"losses": lambda: losses(arguments.steps), "memory": memory, "speed": lambda: speed(arguments.rounds)}
    from machine import describe_machine

    for name in arguments.parts:
        result = {"machine": describe_machine(), **{key: value for key, value in result.items() if key != "machine"}, name: parts[name]()}
        print(json.dumps({name: result[name]}, indent=1), flush=True)
        if path:
            path.write_text(json.dumps(result, indent=1) + "\n")


def losses(steps: int) -> dict:
    """Validation losses by variant and seed, and their distance from bf16's in per cent, paired by seed."""
    settings = [{"weights": weights, "seed": seed, "steps": steps} for seed in SEEDS for weights in VARIANTS]
    train(weights="bf16", seed=0, steps=1)  # prepares the text once
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(in_child, settings))
    table = {}
    for weights in VARIANTS:
        own = [run["val_loss"] for run, setting in zip(runs, settings, strict=True) if setting["weights"] == weights]
        bf16 = [run["val_loss"] for run, setting in zip(runs, settings, strict=True) if setting["weights"] == "bf16"]
        percent = [100 * (loss / other - 1) for loss, other in zip(own, bf16, strict=True)]
        table[weights] = {"val_loss": own, "percent_above_bf16": [round(p, 3) for p in percent], "mean": round(statistics.mean(percent), 3)}
    return {"shape": {**COMMON, **LOSSES, "steps": steps}, "summary": table, "runs": runs}


def in_child(setting: dict) -> dict:
    """`train` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(setting)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def configuration(values: dict, weights: str):
    """The run's configuration."""
    from lowmem.config.load import load_run_config

    overrides = {**COMMON, **values, "train.weight_dtype": weights}
    return load_run_config(overrides=[f"{key}={value}" for key, value in overrides.items()])


def engine_of(config):
    """Model and engine, as `lowmem pretrain` builds them."""
    import torch

    from lowmem.config.schema import resolve_micro_batch_size
    from lowmem.engine.from_config import build_configured_model, build_local_engine

    config.model.max_seq_len = config.max_seq_len()
    model = build_configured_model(config)
    return build_local_engine(config, model, torch.device("cpu"), config.train.precision, resolve_micro_batch_size(config, 1))


def train(weights: str, seed: int, steps: int) -> dict:
    """One run."""
    import torch

    from lowmem.data.batch import Batch
    from lowmem.data.prepare import prepare_data
    from lowmem.optim.from_config import learning_rate

    torch.set_num_threads(1)
    config = configuration({**LOSSES, "train.seed": seed, "train.steps": steps}, weights)
    data = prepare_data(config.data, seed=seed)
    config.model.vocab_size = data.tokenizer.vocab_size
    engine = engine_of(config)
    started, found = time.perf_counter(), []
    for step in range(1, steps + 1):
        batch = Batch.from_windows(data.train.next(config.train.global_batch_size))
        found.append(engine.step(batch, learning_rate(config.optim, step, steps)).loss)
    assert data.validation is not None
    val_loss = engine.evaluate(Batch.from_windows(part) for part in data.validation.windows(256))
    return {
        "weights": weights,
        "seed": seed,
        "parameters": engine.model.num_parameters(),
        "weights_bytes": engine.memory_components()["weights"],
        "val_loss": round(val_loss, 5),
        "train_loss_last_100": round(math.fsum(found[-100:]) / len(found[-100:]), 5),
        "seconds": round(time.perf_counter() - started, 1),
    }


def memory() -> dict:
    """Predicted and measured peak of each variant, in fresh processes."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for weights in VARIANTS:
            overrides = {**COMMON, **MEMORY, "train.weight_dtype": weights, "run_dir": f"{folder}/{weights}"}
            command = [sys.executable, "-m", "lowmem", "pretrain", *(f"--{key}={value}" for key, value in overrides.items())]
            dry = subprocess.run([*command, "--dry_run", "--json"], capture_output=True, text=True, check=True)
            predicted = json.loads(dry.stdout)["predicted"]
            subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=True)
            measured = json.loads(Path(folder, weights, "memory.json").read_text())["measured"]
            rows[weights] = {
                "weights_mb": round(measured["components"]["weights"] / 1e6, 1),
                "measured_peak_mb": round(measured["host_peak_bytes"] / 1e6, 1),
                "predicted_peak_mb": round(predicted["host_peak_bytes"] / 1e6, 1),
                "error_percent": round(100 * (predicted["host_peak_bytes"] / measured["host_peak_bytes"] - 1), 2),
            }
    return {"shape": {**COMMON, **MEMORY}, "rows": rows}


def speed(rounds: int) -> dict:
    """Seconds of a step, and the median over rounds of its ratio to that of bf16 in the same round."""
    import numpy as np

    from lowmem.data.batch import Batch

    engines = {weights: engine_of(configuration({**MEMORY, "train.global_batch_size": 8}, weights)) for weights in VARIANTS}
    times: dict[str, list[float]] = {weights: [] for weights in VARIANTS}
    batch = Batch.from_windows(np.random.default_rng(0).integers(0, LARGE["vocab_size"], (8, 257)))
    for round_number in range(rounds + 1):
        for weights, engine in engines.items():
            started = time.perf_counter()
            engine.step(batch, 1e-4)
            if round_number:  # the first one imports and allocates
                times[weights].append(time.perf_counter() - started)
    ratios = {weights: [own / other for own, other in zip(times[weights], times["bf16"], strict=True)] for weights in VARIANTS}
    return {
        weights: {
            "step_s": round(statistics.median(times[weights]), 3),
            "times_bf16": round(statistics.median(ratios[weights]), 3),
            "all": [round(ratio, 3) for ratio in ratios[weights]],
        }
        for weights in VARIANTS
    }


if __name__ == "__main__":
    main()
