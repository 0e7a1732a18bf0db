"""Everything that needs a GPU, in one command: the tests marked gpu, and runs in fresh processes with their predicted and measured peaks.

    python profiling/gpu_checks.py --out profiling/results/gpu            # about eight minutes on an H100

Tests and runs whose only result is memory go side by side; then those whose speed counts, alone, one after the other: every precision and
every kind of weights at one shape. `--parts predict` needs no GPU: what fine-tuning's runs are predicted to take on one.
Stops starting runs after `--seconds`. Text: the standard library's, by bytes. Adds to checks.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine import describe_machine

TEXT = {"data.sources": "[{stdlib: true, max_bytes: 20000000}]", "data.tokenizer": "bytes"}
SHAPE = {
    **TEXT, "device": "cuda", "model.dim": 1536, "model.num_layers": 8, "model.num_heads": 12, "model.vocab_size": 8192,
    "data.seq_len": 1024, "budget.vram": "60GiB",
    "train.global_batch_size": 16, "train.micro_batch_size": 8, "train.steps": 80, "train.eval_every": 80, "train.eval_sequences": 32,
    "train.save_every": 0, "optim.lr": 3e-4, "optim.warmup_steps": 10, "train.seed": 0,
}  # fmt: skip
LAYERWISE = {"train.update": "layerwise", "train.activation_checkpointing": "block", "optim.state_bits": 8, "train.precision": "bf16"}
SPEED = {
    **{f"precision {name}": {"train.precision": name} for name in ("bf16", "fp8", "fp16", "fp32")},
    **{f"weights {name}": {**LAYERWISE, "train.weight_dtype": name} for name in ("bf16", "int8", "int4", "fp32")},
}
CONFIGS = ("4gib_215m", "t4_200m", "8gib_1b", "6gib_361m", "24gib_3b")
PARTS = ("tests", "finetune", "configs", "precision", "weights", "predict")
FINETUNES = [(method, dtype) for dtype in ("fp32", "bf16") for method in ("lora", "qlora")]


def lowmem(*words: str, limit: float = 240) -> str:
    """Run a command; what it said last, if it failed."""
    try:
        result = subprocess.run([sys.executable, "-m", "lowmem", *words], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"took more than {limit:.0f} s"
    return "" if result.returncode == 0 else (result.stderr.strip() or result.stdout.strip() or "no message")[-600:]


def pretrain(folder: Path, name: str, overrides: dict) -> dict:
    """Memory, losses and seconds of one run."""
    out = folder / name.replace(" ", "_")
    failed = lowmem("pretrain", "--quiet", f"--run_dir={out}", *(f"--{key}={value}" for key, value in overrides.items()))
    if failed:
        return {"failed": failed}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    times = [line["step_time_s"] for line in steps if "step_time_s" in line][5:]
    return {
        "step_s": statistics.median(times) if times else None,
        "last_loss": steps[-1]["loss"],
        "val_loss": next((line["val_loss"] for line in reversed(lines) if "val_loss" in line), None),
        "memory": json.loads((out / "memory.json").read_text()),
    }


def config_peaks(folder: Path, name: str) -> dict:
    """A committed configuration for three steps, on other text."""
    out = folder / f"config_{name}"
    failed = lowmem(
        "profile",
        f"configs/gpu/{name}.yaml",
        "--steps",
        "3",
        "--out",
        str(out),
        "--data.tokenizer_vocab_size=4096",
        *(f"--{key}={value}" for key, value in TEXT.items()),
    )
    files = sorted(out.glob("*.json"))
    return {"failed": failed, "profile": json.loads(files[0].read_text()) if files else None}


def make_llama(base: Path) -> None:
    """A Llama of random weights, 237M numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 9, "num_attention_heads": 20}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=512, **shape)).save_pretrained(base)


def finetune_options(base: Path, chat: Path, out: Path, method: str, dtype: str) -> list[str]:
    """LoRA or QLoRA on that model, computed and kept in `dtype`."""
    options = {
        "model.path": base, "data": chat, "run_dir": out, "device": "cuda", "train.steps": 20, "data.seq_len": 256, "optim.lr": 0.001,
        "train.precision": dtype, "train.weight_dtype": "nf4" if method == "qlora" else dtype, "budget.vram": "60GiB",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in options.items()]


def write_conversations(folder: Path, base: Path) -> Path:
    """Records to learn from, and a tokenizer of bytes beside the model."""
    from lowmem.data.tokenizers import ByteTokenizer

    ByteTokenizer().save(base / "tokenizer.json")
    chat = folder / "chat.jsonl"
    records = [{"prompt": f"Name a number above {n}.", "response": f"{n + 1} is above {n}."} for n in range(200)]
    chat.write_text("\n".join(map(json.dumps, records)))
    return chat


def finetune_predictions(folder: Path, base: Path) -> dict:
    """What is predicted for the runs of `finetune_peaks`, VRAM by component."""
    from lowmem.cli.finetune import DEFAULTS
    from lowmem.config.load import load_run_config
    from lowmem.planning.predict import predict_peak

    chat, found = write_conversations(folder, base), {}
    for method, dtype in FINETUNES:
        options = [option[2:] for option in finetune_options(base, chat, folder / "none", method, dtype)]
        found[f"{method} {dtype}"] = predict_peak(load_run_config("", options, defaults=DEFAULTS)).as_dict()
    return found


def finetune_peaks(folder: Path, base: Path) -> dict:
    """LoRA and QLoRA on that base."""
    chat, found = write_conversations(folder, base), {}
    for method, dtype in FINETUNES:
        out = folder / f"{method}_{dtype}"
        failed = lowmem("finetune", "--quiet", *finetune_options(base, chat, out, method, dtype))
        found[f"{method} {dtype}"] = {"failed": failed} if failed else json.loads((out / "memory.json").read_text())
    return found


def main() -> None:
    """Parse the command line, run the parts, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    arguments = parser.parse_args()
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if list(arguments.parts) == ["predict"]:
        path = arguments.out / "checks.json"
        report = json.loads(path.read_text()) if path.exists() else {}
        with tempfile.TemporaryDirectory() as temporary:
            make_llama(Path(temporary) / "llama")
            found = finetune_predictions(Path(temporary), Path(temporary) / "llama")
            report["finetune_predicted"] = {"machine": describe_machine(), "bytes": found}
        path.write_text(json.dumps(report, indent=1) + "\n")
        return
    device = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    path = arguments.out / "checks.json"
    report = json.loads(path.read_text()) if path.exists() else {"configs": {}, "runs": {}}
    report |= {"machine": describe_machine() | device, "shape": SHAPE}

    def write() -> None:
        path.write_text(json.dumps(report, indent=1) + "\n")

    def tests() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "6", "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
        result = subprocess.run(command, capture_output=True, text=True)
        (arguments.out / "pytest.txt").write_text(result.stdout[-200_000:] + result.stderr[-20_000:])
        report["tests"] = result.stdout.strip().splitlines()[-1:]

    def peaks() -> None:
        if "finetune" in arguments.parts:
            make_llama(folder / "llama")
            report["finetune"] = finetune_peaks(folder, folder / "llama")
        for name in CONFIGS if "configs" in arguments.parts else ():
            if time.monotonic() - started < arguments.seconds / 2:
                report["configs"][name] = config_peaks(folder, name)
                write()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(work) for work in ([tests, peaks] if "tests" in arguments.parts else [peaks])]:
                try:
                    job.result()
                except Exception as error:
                    report.setdefault("errors", []).append(repr(error)[:2000])
        write()
        for name, overrides in SPEED.items():
            if name.split()[0] in arguments.parts and time.monotonic() - started < arguments.seconds:
                report["runs"][name] = pretrain(folder, name, SHAPE | overrides)
                print(name, {key: value for key, value in report["runs"][name].items() if key != "memory"}, flush=True)
                write()


if __name__ == "__main__":
    main()
