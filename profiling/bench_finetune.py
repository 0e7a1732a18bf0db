"""All parameters of a 135M Llama (SmolLM2-135M's shape, random weights) fine-tuned on a CPU: lowmem against Hugging Face's Trainer.

    python profiling/bench_finetune.py --out profiling/results      # about twenty minutes on two cores; writes bench_finetune.json

Every setting runs in a fresh process, all of them in each of `--rounds` rounds, in turn; a ratio is the median over rounds. A step is 16
sequences of 512 random tokens. lowmem: bf16 weights, 4-bit states, micro-batches of 4. Trainer at its best: bf16 weights with fused
AdamW, micro-batches of 4; and 8-bit states of bitsandbytes with gradient checkpointing. Peak memory is the kernel's high-water mark of
the process, so that nothing polls while a step is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_machine

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
SEQUENCES, MICRO, TOKENS = 16, 4, 512
SETTINGS: dict[str, dict[str, Any]] = {
    "Trainer, bf16, fused AdamW": {"side": "trainer", "optim": "adamw_torch_fused", "checkpointing": False},
    "Trainer, bf16, 8-bit AdamW, checkpointing": {"side": "trainer", "optim": "adamw_8bit", "checkpointing": True},
    "lowmem, 4-bit, accumulate": {"side": "lowmem", "update": "accumulate", "checkpointing": "none"},
    "lowmem, 4-bit, accumulate, recomputed": {"side": "lowmem", "update": "accumulate", "checkpointing": "block"},
    "lowmem, 4-bit, layerwise": {"side": "lowmem", "update": "layerwise", "checkpointing": "block"},
}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process, after one that is not")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--out", type=Path, help="folder for bench_finetune.json")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        setting = json.loads(arguments.child)
        print(json.dumps((_lowmem if setting["side"] == "lowmem" else _trainer)(setting)))
        return
    chosen = {name: setting for name, setting in SETTINGS.items() if arguments.only in name}
    with tempfile.TemporaryDirectory(prefix="lowmem-bench-") as folder:
        subprocess.run([sys.executable, "-c", _MAKE, folder, json.dumps(SHAPE)], check=True, capture_output=True)
        rounds = [
            {name: _run({**s, "steps": arguments.steps, "model": folder}) for name, s in chosen.items()} for _ in range(arguments.rounds)
        ]
    result = {"machine": describe_machine(), "shape": SHAPE, "step": [SEQUENCES, TOKENS], "summary": summary(rounds), "rounds": rounds}
    print(json.dumps(result["summary"], indent=1))
    if arguments.out:
        (arguments.out / "bench_finetune.json").write_text(json.dumps(result, indent=1) + "\n")


def summary(rounds: list[dict]) -> dict[str, dict[str, Any]]:
    """Medians of every setting, and its ratios: of speed to the quicker Trainer's, of memory to the smaller Trainer's and the quicker's."""
    table, trainers = {}, [name for name in rounds[0] if name.startswith("Trainer")]
    for name in rounds[0]:
        row: dict[str, Any] = {
            "tokens_per_s": round(statistics.median(r[name]["tokens_per_s"] for r in rounds), 1),
            "host_peak_mb": round(max(r[name]["host_peak_bytes"] for r in rounds) / 1e6),
        }
        if trainers and name not in trainers:
            speeds, least, quickest = [], [], []
            for r in rounds:
                quick = max(trainers, key=lambda trainer: r[trainer]["tokens_per_s"])
                speeds.append(r[name]["tokens_per_s"] / r[quick]["tokens_per_s"])
                quickest.append(r[name]["host_peak_bytes"] / r[quick]["host_peak_bytes"])
                least.append(r[name]["host_peak_bytes"] / min(r[trainer]["host_peak_bytes"] for trainer in trainers))
            row["speed_to_quicker"] = [round(f(speeds), 3) for f in (statistics.median, min, max)]
            row["memory_to_quicker"] = [round(f(quickest), 3) for f in (statistics.median, min, max)]
            row["memory_to_smaller"] = [round(f(least), 3) for f in (statistics.median, min, max)]
        table[name] = row
    return table


_MAKE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[2]))).to(torch.bfloat16)
model.save_pretrained(sys.argv[1])
"""


def _run(setting: dict[str, Any]) -> dict[str, float]:
    result = subprocess.run([sys.executable, __file__, "--child", json.dumps(setting)], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{setting} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"{setting}: {found}", file=sys.stderr, flush=True)
    return found


def _peak_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _lowmem(setting: dict[str, Any]) -> dict[str, float]:
    """Steps of the engine that `lowmem finetune` uses, on the model that it loads."""
    import torch

    from lowmem.config.load import load_run_config
    from lowmem.data.batch import Batch
    from lowmem.engine.from_config import build_configured_model, build_local_engine
    from lowmem.memory.allocator import set_up_host_memory
    from lowmem.system.files import compiled_root

    set_up_host_memory(compiled_root())
    overrides = [
        f"model.path={setting['model']}", "data.sources=[{stdlib: true}]", f"data.seq_len={TOKENS}", "train.steps=1",
        f"train.global_batch_size={SEQUENCES}", f"train.micro_batch_size={MICRO}", "train.precision=bf16", "train.weight_dtype=bf16",
        f"train.update={setting['update']}", f"train.activation_checkpointing={setting['checkpointing']}", "optim.state_bits=4",
        "device=cpu",
    ]  # fmt: skip
    config = load_run_config("", overrides)
    model = build_configured_model(config)
    engine = build_local_engine(config, model, torch.device("cpu"), "bf16", MICRO)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        rows = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, TOKENS + 1), generator=generator).numpy()
        return Batch(rows[:, :-1].copy(), rows[:, 1:].copy())

    engine.step(batch(), 1e-4)
    times = []
    for _ in range(setting["steps"]):
        begun = time.perf_counter()
        engine.step(batch(), 1e-4)
        times.append(time.perf_counter() - begun)
    return {"tokens_per_s": SEQUENCES * TOKENS / statistics.median(times), "host_peak_bytes": _peak_bytes()}


def _trainer(setting: dict[str, Any]) -> dict[str, float]:
    """Steps of Hugging Face's Trainer on the same model."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.bfloat16)
    model.config.use_cache = False
    tokens = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES * (setting["steps"] + 1), TOKENS), generator=torch.Generator().manual_seed(0))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=MICRO, gradient_accumulation_steps=SEQUENCES // MICRO, max_steps=setting["steps"] + 1,
            optim=setting["optim"], gradient_checkpointing=setting["checkpointing"], bf16=False, use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", learning_rate=1e-4, dataloader_num_workers=0, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return {"tokens_per_s": SEQUENCES * TOKENS / statistics.median(times[1:]), "host_peak_bytes": _peak_bytes()}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
