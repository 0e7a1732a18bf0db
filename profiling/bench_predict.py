"""Predicted against measured peak host memory, configuration by configuration, in fresh processes.

    python profiling/bench_predict.py --out profiling/results     # half an hour on two cores; writes bench_predict.json

Every configuration is trained for a few steps with an evaluation and a save; `memory.json` of the run holds the measured peak of the
process tree (of all ranks), the prediction comes from another process that allocates no model. Text is prepared beforehand, so that the
measured peak is the training's. The error is predicted / measured - 1: negative is too low, the dangerous side.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

COMMON = [
    "data.sources=[{stdlib: true, max_bytes: 3000000}]", "data.tokenizer=bytes", "data.seq_len=256", "data.val_fraction=0.05",
    "train.steps=2", "train.eval_every=2", "train.eval_sequences=4", "train.save_every=2", "device=cpu", "model.vocab_size=16000",
    "model.dim=512", "model.num_layers=6", "model.num_heads=8", "train.global_batch_size=8", "train.micro_batch_size=4",
]  # fmt: skip
LARGE = [
    "model.dim=1024",
    "model.hidden_dim=2688",
    "model.num_heads=16",
    "model.num_layers=12",
    "model.vocab_size=32000",
    "data.seq_len=512",
]
LAYERWISE = ["train.update=layerwise", "train.activation_checkpointing=block"]
BF16 = ["train.precision=bf16", "train.weight_dtype=bf16"]
FP32 = ["train.precision=fp32"]
I3 = ["model.name=i3", "model.num_heads=1", "model.attention_rank=64"]


def zero(stage: int, *more: str) -> list[str]:
    """Two ranks under DeepSpeed."""
    return ["engine.name=deepspeed", f"engine.zero_stage={stage}", *more]


CONFIGS: dict[str, list[str]] = {
    "base": [],
    "fp32": FP32,
    "width 256": ["model.dim=256"],
    "width 1024": ["model.dim=1024"],
    "depth 2": ["model.num_layers=2"],
    "depth 16": ["model.num_layers=16"],
    "vocabulary 4000": ["model.vocab_size=4000"],
    "vocabulary 64000": ["model.vocab_size=64000"],
    "tied": ["model.tie_embeddings=true"],
    "sequence 64": ["data.seq_len=64"],
    "sequence 1024": ["data.seq_len=1024", "train.micro_batch_size=2", "train.global_batch_size=4"],
    "micro-batch 1": ["train.micro_batch_size=1"],
    "micro-batch 8": ["train.micro_batch_size=8"],
    "micro-batch 16": ["train.micro_batch_size=16", "train.global_batch_size=16"],
    "no recompute": ["train.activation_checkpointing=none"],
    "block recompute": ["train.activation_checkpointing=block"],
    "gelu, layernorm, learned": ["model.activation=gelu", "model.norm=layernorm", "model.positions=learned"],
    "alibi": ["model.positions=alibi"],
    "8 bits": ["optim.state_bits=8"],
    "4 bits": ["optim.state_bits=4"],
    "lion": ["optim.name=lion", "optim.lr=1e-4"],
    "lion 4 bits": ["optim.name=lion", "optim.state_bits=4"],
    "bitsandbytes": ["optim.state_bits=8", "optim.backend=bitsandbytes"],
    "bf16 weights": BF16,
    "bf16 weights, 4 bits": [*BF16, "optim.state_bits=4"],
    "layerwise": LAYERWISE,
    "layerwise, 4 bits": [*LAYERWISE, "optim.state_bits=4"],
    "layerwise, bf16, 4 bits": [*LAYERWISE, *BF16, "optim.state_bits=4"],
    "layerwise, selective": ["train.update=layerwise", "optim.state_bits=8"],
    "layerwise, batch 32": [*LAYERWISE, *BF16, "optim.state_bits=4", "train.global_batch_size=32"],
    "lorpt mlp": ["model.lorpt.rank=64"],
    "lorpt all, 4 bits": ["model.lorpt.rank=96", "model.lorpt.targets=[attention, mlp]", "optim.state_bits=4"],
    "lorpt layerwise": ["model.lorpt.rank=64", *LAYERWISE, "optim.state_bits=8"],
    "low-rank attention": ["model.attention_rank=64"],
    "i3": I3,
    "i3, 4 bits": [*I3, "optim.state_bits=4"],
    "i3, layerwise": [*I3, *LAYERWISE, "optim.state_bits=4"],
    "215M, 4 bits, layerwise, 1 x 512": [
        *LARGE,
        *LAYERWISE,
        *BF16,
        "optim.state_bits=4",
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
    ],
    "215M, 4 bits, layerwise, 8 x 512": [*LARGE, *LAYERWISE, *BF16, "optim.state_bits=4", "train.global_batch_size=8"],
    "215M, 4 bits, accumulate": [*LARGE, *BF16, "optim.state_bits=4", "train.global_batch_size=4", "train.micro_batch_size=4"],
    "215M, fp32 AdamW": [*LARGE, "train.global_batch_size=2", "train.micro_batch_size=2"],
    "zero 0, 2 ranks": zero(0),
    "zero 1, 2 ranks": zero(1),
    "zero 2, 2 ranks": zero(2),
    "zero 3, 2 ranks": zero(3),
    "zero 2, offload, 4 bits, 2 ranks": zero(2, "engine.offload=cpu", "optim.state_bits=4"),
    "zero 3, offload, 8 bits, 2 ranks": zero(3, "engine.offload=cpu", "optim.state_bits=8"),
}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--again", type=Path, help="a bench_predict.json whose measurements are kept; only the predictions are made anew")
    parser.add_argument("--out", type=Path, help="folder for bench_predict.json")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in CONFIGS.items():
            if arguments.only in name:
                kept = json.loads(arguments.again.read_text())["rows"].get(name) if arguments.again else None
                rows[name] = predict_again(name, settings, kept) if kept else compare(name, settings, Path(folder))
                print(f"{name:36} {json.dumps({key: value for key, value in rows[name].items() if key != 'components'})}", flush=True)
    result = {"machine": describe_machine(), "summary": summary(list(rows.values())), "rows": rows}
    print(json.dumps(result["summary"], indent=1))
    if arguments.out:
        (arguments.out / "bench_predict.json").write_text(json.dumps(result, indent=1) + "\n")


def compare(name: str, settings: list[str], folder: Path) -> dict:
    """One configuration: predicted and measured peak, and the relative error."""
    ranks = 2 if "2 ranks" in name else 1
    run_dir = folder / "".join(character if character.isalnum() else "-" for character in name)
    arguments = [f"--{setting}" for setting in [*COMMON, *settings, f"run_dir={run_dir}"]]
    command = [sys.executable, "-m", "lowmem.cli"]
    if ranks > 1:
        command = [
            str(Path(sys.executable).parent / "deepspeed"),
            "-q",
            "--no_local_rank",
            "--master_port",
            str(free_port()),
            "--num_gpus",
            "2",
            "--module",
            "lowmem.cli",
        ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-c", PREPARE, *arguments], check=True, env=environment)
    began = time.perf_counter()
    subprocess.run([*command, "pretrain", "--quiet", *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    ran_s, began = time.perf_counter() - began, time.perf_counter()
    ranked = {**environment, "LOCAL_WORLD_SIZE": str(ranks)}
    answer = subprocess.run([sys.executable, "-c", PREDICT, *arguments], check=True, env=ranked, capture_output=True, text=True)
    predicted = json.loads(answer.stdout)
    measured = json.loads((run_dir / "memory.json").read_text())["measured"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "error": round(predicted["host_peak_bytes"] / measured["host_peak_bytes"] - 1, 4),
        "predicted_mb": round(predicted["host_peak_bytes"] / 1e6),
        "measured_mb": round(measured["host_peak_bytes"] / 1e6),
        "phases_measured_mb": {phase: round(peaks["host_peak_bytes"] / 1e6) for phase, peaks in measured["phases"].items()},
        "phases_predicted_mb": {phase: round(size / 1e6) for phase, size in predicted["host_phases"].items()},
        "speed_ratio": round(predicted["tokens_per_s"] / max(line.get("tokens_per_s", 0) for line in lines), 2),
        "run_s": round(ran_s, 1),
        "prediction_s": round(time.perf_counter() - began, 1),
        "predictor_mb": round(predicted["predictor_peak_bytes"] / 1e6),
        "components": predicted["components"],
    }


def predict_again(name: str, settings: list[str], kept: dict) -> dict:
    """A row with the same measurement and a new prediction."""
    arguments, began = [f"--{setting}" for setting in [*COMMON, *settings]], time.perf_counter()
    environment = {**os.environ, "LOCAL_WORLD_SIZE": "2" if "2 ranks" in name else "1"}
    answer = subprocess.run([sys.executable, "-c", PREDICT, *arguments], check=True, env=environment, capture_output=True, text=True)
    predicted = json.loads(answer.stdout)
    return kept | {
        "error": round(predicted["host_peak_bytes"] / 1e6 / kept["measured_mb"] - 1, 4),
        "predicted_mb": round(predicted["host_peak_bytes"] / 1e6),
        "phases_predicted_mb": {phase: round(size / 1e6) for phase, size in predicted["host_phases"].items()},
        "prediction_s": round(time.perf_counter() - began, 1),
        "predictor_mb": round(predicted["predictor_peak_bytes"] / 1e6),
        "components": predicted["components"],
    }


PREPARE = """
import sys
from lowmem.config_load import load_run_config
from lowmem.data.prepare import prepare_data
config = load_run_config(overrides=[argument[2:] for argument in sys.argv[1:]])
prepare_data(config.data, seed=0)
"""
PREDICT = """
import json, os, resource, sys
from lowmem.config_load import load_run_config
from lowmem.planning.predict import predict_peak
config = load_run_config(overrides=[argument[2:] for argument in sys.argv[1:]])
predicted = predict_peak(config, int(os.environ["LOCAL_WORLD_SIZE"])).as_dict()
print(json.dumps(predicted | {"predictor_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def summary(rows: list[dict]) -> dict:
    """The claims: median and worst error, and the worst on the low side."""
    errors = [row["error"] for row in rows]
    return {
        "configurations": len(rows),
        "median_error": round(statistics.median(map(abs, errors)), 4),
        "worst_error": max(errors, key=abs),
        "lowest": min(errors),
        "median_prediction_s": statistics.median(row["prediction_s"] for row in rows),
        "predictor_peak_mb": max(row["predictor_mb"] for row in rows),
        "median_speed_ratio": statistics.median(row["speed_ratio"] for row in rows),
    }


if __name__ == "__main__":
    main()
