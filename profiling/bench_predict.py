"""Predicted against measured peak host memory, configuration by configuration, in fresh processes.

    python profiling/bench_predict.py --out profiling/results             # half an hour on two cores; writes bench_predict.json
    python profiling/bench_predict.py --drawn 30 --out profiling/results  # the same for settings drawn by seed: bench_predict_drawn.json
    python profiling/bench_predict.py --transformers --out profiling/results             # models of transformers: bench_predict_hf.json
    python profiling/bench_predict.py --transformers --drawn 30 --seed 1 --out DIR       # others of them: bench_predict_hf_drawn.json

Every configuration is trained for a few steps with an evaluation and a save; `memory.json` of the run holds the measured peak of the
process tree (of all ranks), the prediction comes from another process that allocates no model. Text is prepared beforehand, so that the
measured peak is the training's. The error is predicted / measured - 1: negative is too low, the dangerous side.

Drawn rows come from the whole space of settings (`draw`), and are written one by one: what is in the file already is kept, so that an
interrupted run goes on. They say nothing of speed. Rows of transformers (`transformers_rows.py`: Llama, Qwen2, Gemma 3 and GPT-2 of 5 to
60 million numbers, whole, LoRA and QLoRA, text and conversations) are drawn and written the same way.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers_rows
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
    "lion 8 bits": ["optim.name=lion", "optim.state_bits=8"],
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
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="N configurations drawn by seed instead")
    parser.add_argument("--seed", type=int, default=0, help="of --drawn")
    parser.add_argument("--transformers", action="store_true", help=f"models of transformers: the table of {TABLE_ROWS}, or --drawn N")
    arguments = parser.parse_args()
    if arguments.drawn or arguments.transformers:
        seed = arguments.seed if arguments.drawn else "table"
        name = f"bench_predict{'_hf' * arguments.transformers}{'_drawn' * bool(arguments.drawn)}.json"
        path = arguments.out / name if arguments.out else None
        with tempfile.TemporaryDirectory() as files:
            space = Space(transformers_rows.draw if arguments.transformers else draw, Path(files))
            measure_drawn(space, arguments.drawn or TABLE_ROWS, seed, arguments.only, arguments.again, path)
        return
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
    command = [sys.executable, "-m", "lowmem"]
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
            "lowmem",
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


DRAWN_COMMON = [
    "data.sources=[{stdlib: true, max_bytes: 3000000}]", "data.val_fraction=0.05", "train.steps=2", "train.eval_every=2",
    "train.eval_sequences=4", "train.save_every=2", "train.threads=1", "device=cpu", "optim.lr=1e-4",
]  # fmt: skip
TABLE_ROWS = 24  # of models of transformers: every family, method and update once
FLOPS_PER_STEP = 1e11  # of a drawn row, so that the table takes half an hour
BPE_ROWS = 2000


def draw(seed: int, number: int) -> list[str]:
    """Settings of one row: drawn until they contradict nothing and a step takes at most FLOPS_PER_STEP.

    A row depends on the seed and its number only; one that is refused is drawn again.
    """
    from lowmem.config.load import load_run_config
    from lowmem.system.errors import ConfigError

    for attempt in range(1000):
        rng = random.Random(f"{seed} {number} {attempt}")
        settings = draw_once(rng)
        try:
            config = load_run_config(overrides=[*DRAWN_COMMON, *settings])
        except ConfigError:
            continue
        model = config.model
        parameters = 12 * model.num_layers * model.dim**2 + 2 * model.vocab_size * model.dim
        if 6 * parameters * config.train.global_batch_size * config.data.seq_len <= FLOPS_PER_STEP:
            return settings
    raise SystemExit(f"no settings for row {number} of seed {seed}")


def draw_once(rng: random.Random) -> list[str]:
    """Every setting by itself; some contradict each other."""
    dim, micro = rng.randrange(192, 1025, 64), rng.choice([1, 2, 4, 8])
    tokenizer = rng.choice(["bytes", "bpe"])
    rows = BPE_ROWS if tokenizer == "bpe" else 259
    vocabulary = rng.choice([rows, rng.randrange(rows, 50_000)])
    rank = rng.choice([0, 0, dim // 8, dim // 4])
    name, bits = rng.choice(["adamw", "adamw", "lion", "spectron"]), rng.choice([32, 8, 4])
    positions = rng.choice(["rope", "alibi", "learned"])
    weights = rng.choice(["fp32", "fp32", "bf16", "int8", "int4"])
    settings = {
        "model.dim": dim, "model.num_layers": rng.randint(2, 12), "model.num_heads": dim // rng.choice([32, 64]),
        "model.vocab_size": vocabulary, "model.positions": positions, "model.tie_embeddings": rng.choice(["true", "false"]),
        "model.norm": rng.choice(["rmsnorm", "layernorm"]), "model.activation": rng.choice(["swiglu", "gelu"]),
        "model.lorpt.rank": rank, "data.tokenizer": tokenizer,
        "data.seq_len": rng.choice([64, 128, 256, 512, 640, 1024]), "optim.name": name, "optim.state_bits": bits,
        "optim.backend": rng.choice(["lowmem"] * 5 + ["bitsandbytes"]), "train.update": rng.choice(["accumulate", "layerwise"]),
        "train.activation_checkpointing": rng.choice(["none", "block", "selective", "low_rank"]),
        "train.weight_dtype": weights, "train.precision": "bf16" if weights == "bf16" else rng.choice(["fp32", "bf16"]),
        "train.micro_batch_size": micro, "train.global_batch_size": micro * rng.choice([1, 2, 4]),
    }  # fmt: skip
    if tokenizer == "bpe":
        settings["data.tokenizer_vocab_size"] = BPE_ROWS
    return [f"{key}={value}" for key, value in settings.items()]


@dataclass(frozen=True)
class Space:
    """Where rows are drawn from.

    Attributes:
        draw: settings of a row, by seed and number.
        files: folder for the files that settings name.
    """

    draw: Callable[[Any, int], list[str]]
    files: Path


def measure_drawn(space: Space, count: int, seed: int | str, only: str, again: Path | None, path: Path | None) -> None:
    """Rows 0 to count - 1, each written to `path` as soon as it is known; see `main`."""
    kept = json.loads((again or path).read_text())["rows"] if (again or path) and (again or path).exists() else {}
    rows = {}
    for number in range(count):
        name, settings = f"{seed}/{number}", space.draw(seed, number)
        if only and only not in f" {name} ":
            continue
        earlier = kept.get(name) if kept.get(name, {}).get("settings") == settings else None
        if earlier is None or again:
            here = transformers_rows.located(settings, space.files)
            measured = earlier or measure_row(here)
            rows[name] = {"settings": settings, **measured, **predict_row(here, measured["measured_mb"])}
            print(f"{name:8} {json.dumps({k: v for k, v in rows[name].items() if k != 'components'})}", flush=True)
        else:
            rows[name] = earlier
        result = {"machine": describe_machine(), "seed": seed, "summary": error_summary(list(rows.values())), "rows": rows}
        if path:
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


def measure_row(settings: list[str]) -> dict:
    """Peak of a run in a process of its own, with text that is prepared beforehand."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"--{setting}" for setting in [*DRAWN_COMMON, *settings, f"run_dir={folder}/run"]]
        prepare(tuple(f"--{setting}" for setting in [*DRAWN_COMMON, *settings] if setting.startswith(_OF_DATA)))
        command = [sys.executable, "-m", "lowmem", "pretrain", "--quiet", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured = json.loads(Path(folder, "run", "memory.json").read_text())["measured"]
    return {
        "measured_mb": round(measured["host_peak_bytes"] / 1e6, 1),
        "phases_measured_mb": {phase: round(peaks["host_peak_bytes"] / 1e6) for phase, peaks in measured["phases"].items()},
    }


_OF_DATA = ("data.", "model.path=", "train.steps=", "train.activation_checkpointing=")


@cache
def prepare(arguments: tuple[str, ...]) -> None:
    """Tokenise the text in a process of its own, once for all rows that share it."""
    subprocess.run([sys.executable, "-c", PREPARE, *arguments], check=True)


def predict_row(settings: list[str], measured_mb: float) -> dict:
    """What is predicted for a row, and the error."""
    from lowmem.config.load import load_run_config
    from lowmem.planning import predict
    from lowmem.planning.hardware import Rates
    from lowmem.planning.predict import predict_peak

    rates = Rates({"float32": 1e11}, 1e10, 1e-6, dict.fromkeys(("32", "8", "4", "bitsandbytes"), 1e8))
    predict.rates_for = lambda config: rates  # the table says nothing of speed
    predicted = predict_peak(load_run_config(overrides=[*DRAWN_COMMON, *settings])).as_dict()
    return {
        "error": round(predicted["host_peak_bytes"] / 1e6 / measured_mb - 1, 4),
        "predicted_mb": round(predicted["host_peak_bytes"] / 1e6, 1),
        "phases_predicted_mb": {phase: round(size / 1e6) for phase, size in predicted["host_phases"].items()},
        "components": predicted["components"],
    }


PREPARE = """
import sys
from lowmem.config.load import load_run_config
from lowmem.data.prepare import prepare_phases
from lowmem.engine.resolve import settled_model
config = load_run_config(overrides=[argument[2:] for argument in sys.argv[1:]])
prepare_phases(settled_model(config))
"""
PREDICT = """
import json, os, resource, sys
from lowmem.config.load import load_run_config
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


def error_summary(rows: list[dict]) -> dict:
    """The claims: median and worst error, and the worst on the low side."""
    errors = [row["error"] for row in rows]
    return {
        "configurations": len(rows),
        "median_error": round(statistics.median(map(abs, errors)), 4),
        "worst_error": max(errors, key=abs),
        "lowest": min(errors),
    }


def summary(rows: list[dict]) -> dict:
    """`error_summary`, and what a prediction takes."""
    return error_summary(rows) | {
        "median_prediction_s": statistics.median(row["prediction_s"] for row in rows),
        "predictor_peak_mb": max(row["predictor_mb"] for row in rows),
        "median_speed_ratio": statistics.median(row["speed_ratio"] for row in rows),
    }


if __name__ == "__main__":
    main()
