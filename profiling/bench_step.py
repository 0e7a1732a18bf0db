"""Training steps of lowmem against Hugging Face's Llama of the same shape: tokens/s and peak resident memory, in one run.

    python profiling/bench_step.py --out profiling/results            # about twenty minutes on two cores
    python profiling/bench_step.py --shapes 12m --rounds 1            # a quick look

Each measurement is a fresh process: random tokens, one warm-up step, then timed steps of forward, backward, clipping and a
fused AdamW update. First every setting of each side runs once; then the fastest of lowmem, of Hugging Face and of Hugging
Face without torch.compile alternate for `--rounds` rounds, and a ratio is the median over rounds of lowmem's median step
against the other's of the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "215m": {"dim": 1024, "hidden_dim": 2688, "num_layers": 12, "num_heads": 16, "vocab_size": 32000, "seq_len": 512},
    "12m": {"dim": 320, "hidden_dim": 864, "num_layers": 6, "num_heads": 5, "vocab_size": 8192, "seq_len": 256},
}
HF_SETTINGS = {
    "215m": [
        {"weights": "fp32", "autocast": False, "batch": 1},
        {"weights": "fp32", "autocast": True, "batch": 4},
        {"weights": "bf16", "autocast": False, "batch": 1},
        {"weights": "bf16", "autocast": False, "batch": 4},
        {"weights": "bf16", "autocast": False, "batch": 4, "compile": True},
    ],
    "12m": [
        {"weights": "fp32", "autocast": False, "batch": 16},
        {"weights": "fp32", "autocast": True, "batch": 4},
        {"weights": "fp32", "autocast": True, "batch": 16},
        {"weights": "bf16", "autocast": False, "batch": 4},
        {"weights": "bf16", "autocast": False, "batch": 16},
        {"weights": "fp32", "autocast": True, "batch": 16, "compile": True},
        {"weights": "bf16", "autocast": False, "batch": 16, "compile": True},
    ],
}
LOWMEM_SETTINGS = {
    "215m": [
        {"weights": "bf16", "batch": 1, "checkpointing": "selective"},
        {"weights": "bf16", "batch": 2, "checkpointing": "selective"},
        {"weights": "bf16", "batch": 4, "checkpointing": "selective"},
        {"weights": "bf16", "batch": 8, "checkpointing": "selective"},
        {"weights": "bf16", "batch": 4, "checkpointing": "block"},
    ],
    "12m": [
        {"weights": "fp32", "autocast": False, "batch": 16, "checkpointing": "selective"},
        {"weights": "fp32", "autocast": True, "batch": 4, "checkpointing": "selective"},
        {"weights": "fp32", "autocast": True, "batch": 16, "checkpointing": "none"},
        {"weights": "fp32", "autocast": True, "batch": 16, "checkpointing": "selective"},
        {"weights": "bf16", "batch": 16, "checkpointing": "selective"},
    ],
}
I3 = {"dim": 512, "state_dim": 32, "num_layers": 12, "seq_len": 256, "batches": [1, 16]}


def main() -> None:
    """Parse the command line, measure, print and write one JSON file per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "i3"], choices=[*SHAPES, "i3"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="timed steps per process; 0 fills about 10 seconds, three steps at least")
    parser.add_argument("--out", type=Path, help="folder for bench_step_SHAPE.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    for shape in arguments.shapes:
        result = compare_i3(arguments) if shape == "i3" else compare(shape, arguments)
        print(json.dumps(result["summary"], indent=1), flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"bench_step_{shape}.json").write_text(json.dumps(result, indent=1) + "\n")


def compare(shape: str, arguments: argparse.Namespace) -> dict:
    """Sweep both sides, then alternate their fastest settings."""
    from machine import describe_machine

    sweeps = {
        side: [run({"side": side, "shape": shape, "steps": arguments.steps, **setting}) for setting in settings[shape]]
        for side, settings in (("hf", HF_SETTINGS), ("lowmem", LOWMEM_SETTINGS))
    }

    def fastest_of(rows: list[dict]) -> dict:
        return max(rows, key=lambda row: row["tokens_per_s"])["setting"]

    eager = [row for row in sweeps["hf"] if not row["setting"].get("compile")]
    settings = {"hf": fastest_of(sweeps["hf"]), "hf_eager": fastest_of(eager), "lowmem": fastest_of(sweeps["lowmem"])}
    rounds = [{side: run(setting) for side, setting in settings.items()} for _ in range(arguments.rounds)]
    summary: dict = {"shape": shape, "fastest": settings}
    for other in ("hf", "hf_eager"):
        for name, key in (("speed", "tokens_per_s"), ("memory", "host_peak_bytes")):
            ratios = [r["lowmem"][key] / r[other][key] for r in rounds]
            summary[f"{name}_ratio_to_{other}"] = round(statistics.median(ratios), 3)
            summary[f"{name}_ratio_to_{other}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return {"machine": describe_machine(), "shape": SHAPES[shape], "summary": summary, "sweeps": sweeps, "rounds": rounds}


def compare_i3(arguments: argparse.Namespace) -> dict:
    """i3's recurrence in parallel against its loop: the cells alone, and the whole training step of the 12.7M model."""
    from machine import describe_machine

    rounds, ratios = [], {}
    for _ in range(arguments.rounds):
        rows = {}
        for part in ("cells", "model"):
            for batch in I3["batches"]:
                settings = [{"side": f"i3_{part}", "form": form, "batch": batch, "steps": 3} for form in ("loop", "parallel")]
                loop, parallel = (run(setting) for setting in settings)
                rows[f"{part}_batch_{batch}"] = {"loop": loop, "parallel": parallel}
                ratio = parallel["tokens_per_s"] / loop["tokens_per_s"]
                ratios.setdefault(f"{part}_batch_{batch}", []).append(ratio)
        rounds.append(rows)
    summary = {
        name: {"speed_ratio": round(statistics.median(r), 2), "range": [round(min(r), 2), round(max(r), 2)]} for name, r in ratios.items()
    }
    return {"machine": describe_machine(), "shape": I3, "summary": {"shape": "i3_12m", **summary}, "rounds": rounds}


def run(setting: dict) -> dict:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(setting)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
    row = {"setting": setting, **json.loads(result.stdout.splitlines()[-1])}
    print(f"{row['tokens_per_s']:9.1f} tokens/s {row['host_peak_bytes'] / 1e6:8.0f} MB  {setting}", file=sys.stderr, flush=True)
    return row


def measure(setting: dict) -> dict:
    """In the child: build, warm up, time steps."""
    import torch

    from lowmem.memory.measure import measure_peak

    torch.manual_seed(0)
    with measure_peak() as peak:
        step, tokens = {"hf": hf_step, "lowmem": lowmem_step, "i3_model": i3_model_step, "i3_cells": i3_cells_step}[setting["side"]](
            setting
        )
        first_loss = step()
        times, budget_s = [], 10.0
        while len(times) < (setting["steps"] or 1000) and (setting["steps"] or len(times) < 3 or sum(times) < budget_s):
            started = time.perf_counter()
            loss = step()
            times.append(time.perf_counter() - started)
    return {
        "tokens_per_s": tokens / statistics.median(times),
        "step_s": [round(t, 4) for t in times],
        "host_peak_bytes": peak.host_peak_bytes,
        "first_loss": first_loss,
        "last_loss": loss,
    }


def hf_step(setting: dict):
    """A step of transformers' LlamaForCausalLM with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[setting["shape"]]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape["dim"], intermediate_size=shape["hidden_dim"], num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"], num_key_value_heads=shape["num_heads"], vocab_size=shape["vocab_size"],
            max_position_embeddings=shape["seq_len"], attn_implementation="sdpa", use_cache=False, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model = model.to(torch.bfloat16) if setting["weights"] == "bf16" else model.float()
    if setting.get("checkpointing"):
        model.gradient_checkpointing_enable()
    optimizer = hf_optimizer(model, setting.get("state_bits", 32))
    forward = torch.compile(model) if setting.get("compile") else model
    tokens = torch.randint(shape["vocab_size"], (setting["batch"], shape["seq_len"]))

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting["autocast"]):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, tokens.numel()


def hf_optimizer(model, state_bits: int):
    """torch's fused AdamW, or bitsandbytes' with 8-bit states."""
    import torch

    if state_bits == 32:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)


def lowmem_step(setting: dict):
    """A step of lowmem's own engine, as a run would take it."""
    import numpy as np

    from lowmem.config.schema import RunConfig
    from lowmem.data.batch import Batch

    shape = SHAPES[setting["shape"]]
    config = RunConfig()
    for name in ("dim", "hidden_dim", "num_layers", "num_heads", "vocab_size"):
        setattr(config.model, name, shape[name])
    config.model.max_seq_len = shape["seq_len"]
    config.train.activation_checkpointing = setting["checkpointing"]
    config.train.weight_dtype = setting["weights"]
    config.train.update, config.optim.state_bits = setting.get("update", "accumulate"), setting.get("state_bits", 32)
    precision = "bf16" if setting["weights"] == "bf16" or setting.get("autocast") else "fp32"
    engine = build_engine(config, precision, setting.get("micro", setting["batch"]))
    windows = np.random.default_rng(0).integers(shape["vocab_size"], size=(setting["batch"], shape["seq_len"] + 1))
    return (lambda: engine.step(Batch.from_windows(windows), lr=1e-4).loss), windows[:, 1:].size


def i3_model_step(setting: dict):
    """A step of i3_12m with its recurrence in parallel or as a loop over time."""
    import numpy as np

    from lowmem.config.load import load_run_config
    from lowmem.data.batch import Batch

    choose_form(setting["form"])
    config = load_run_config(Path(__file__).parent.parent / "configs/cpu/i3_12m.yaml")
    engine = build_engine(config, "fp32", setting["batch"])
    windows = np.random.default_rng(0).integers(config.model.vocab_size, size=(setting["batch"], I3["seq_len"] + 1))
    return (lambda: engine.step(Batch.from_windows(windows), lr=1e-4).loss), windows[:, 1:].size


def i3_cells_step(setting: dict):
    """Forward and backward of the 12 hybrid cells alone."""
    import torch

    from lowmem.nn.recurrent import HybridCell

    choose_form(setting["form"])
    cells = [HybridCell(I3["dim"], I3["state_dim"]) for _ in range(I3["num_layers"])]
    x = torch.randn(setting["batch"], I3["seq_len"], I3["dim"])

    def step() -> float:
        for cell in cells:
            cell.zero_grad(set_to_none=True)
            inputs = x.detach().requires_grad_()
            cell(inputs).sum().backward()
        return 0.0

    return step, x.shape[0] * x.shape[1]


def choose_form(form: str) -> None:
    """Train the recurrence through its definition, the loop, instead of the scan."""
    from lowmem.nn import recurrent

    if form == "loop":
        recurrent.hybrid_scan = lambda *arguments: recurrent.hybrid_loop(*arguments)[0]


def build_engine(config, precision: str, batch: int):
    """lowmem's local engine for a configuration, with the memory set up as a run sets it up."""
    import torch

    from lowmem.engine.from_config import build_configured_model, build_local_engine
    from lowmem.memory.allocator import release_host_memory, set_up_host_memory
    from lowmem.system.files import compiled_root

    assert not set_up_host_memory(compiled_root())
    engine = build_local_engine(config, build_configured_model(config), torch.device("cpu"), precision, batch)
    release_host_memory()
    return engine


if __name__ == "__main__":
    main()
