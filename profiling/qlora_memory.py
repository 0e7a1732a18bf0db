"""QLoRA against LoRA on this CPU: the difference of their peaks, predicted and measured, and their losses over several seeds.

    python profiling/qlora_memory.py --data chat.json --loss_base runs/chat-hf --out profiling/results/qlora_memory.json

The model is a Llama of random weights, `--width` wide, for memory alone needs no training; the losses are those of one that was trained,
`--loss_base`, a directory of transformers such as `lowmem export` writes. Every run has a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine


def make_base(folder: Path, tokenizer: Path, width: int, layers: int) -> None:
    """A Llama directory with a bpe tokenizer of the repository's kind."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowmem.data.tokenizer_loading import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    LlamaForCausalLM(LlamaConfig(vocab_size=loaded.vocab_size, max_position_embeddings=512, **shape)).save_pretrained(folder)
    loaded.save(folder / "tokenizer.json")


METHODS = {"lora": [], "qlora": ["--train.weight_dtype=nf4"]}


def command(base: Path, data: str, out: Path, method: str, *more: str) -> list[str]:
    """One run, or what is predicted of it."""
    return [
        sys.executable, "-m", "lowmem", "finetune", "--quiet", f"--model.path={base}", f"--data={data}", f"--run_dir={out}", "--device=cpu",
        "--train.save_every=0", "--optim.lr=0.002", "--train.global_batch_size=4", "--train.micro_batch_size=1", *METHODS[method], *more,
    ]  # fmt: skip


def finetune(base: Path, data: str, out: Path, method: str, steps: int, seed: int, seq_len: int) -> dict:
    """Peak and held-out losses of one run in a fresh process."""
    more = [f"--train.steps={steps}", f"--train.eval_every={max(1, steps // 5)}", f"--train.seed={seed}", f"--data.seq_len={seq_len}"]
    subprocess.run(command(base, data, out, method, *more), check=True, capture_output=True)
    measured = json.loads((out / "memory.json").read_text())["measured"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    phases = [measured["phases"][name]["host_peak_bytes"] for name in ("first_step", "steady_steps") if name in measured["phases"]]
    return {"peak_bytes": max(phases), "losses": losses}


def predicted_weights(base: Path, data: str, out: Path, method: str, seq_len: int) -> int:
    """Bytes of all weights, the frozen ones and the adapter's."""
    predict = command(base, data, out, method, "--dry_run", "--json", f"--data.seq_len={seq_len}")
    answer = subprocess.run(predict, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)["predicted"]["components"]["weights"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--loss_base", required=True, help="directory of transformers, for the losses and the tokenizer")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--memory_steps", type=int, default=3)
    parser.add_argument("--loss_steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("data", "loss_base", "out")}
    report: dict = {"machine": describe_machine(), "settings": settings}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base"
        make_base(base, Path(arguments.loss_base) / "tokenizer.json", arguments.width, arguments.layers)
        peaks = {m: finetune(base, arguments.data, folder / f"memory-{m}", m, arguments.memory_steps, 0, 128) for m in ("lora", "qlora")}
        lora, qlora = (predicted_weights(base, arguments.data, folder / "none", method, 128) for method in METHODS)
        saved = lora - qlora
        measured = peaks["lora"]["peak_bytes"] - peaks["qlora"]["peak_bytes"]
        report["memory"] = {
            "lora_peak_bytes": peaks["lora"]["peak_bytes"], "qlora_peak_bytes": peaks["qlora"]["peak_bytes"],
            "predicted_difference_bytes": saved, "measured_difference_bytes": measured, "measured_over_predicted": measured / saved,
        }  # fmt: skip
        losses: dict[str, list[dict]] = {}
        for method in ("lora", "qlora"):
            for seed in range(arguments.seeds):
                out = folder / f"{method}-{seed}"
                run = finetune(Path(arguments.loss_base), arguments.data, out, method, arguments.loss_steps, seed, 256)
                losses.setdefault(method, []).append(run["losses"])
        report["losses"] = losses
        ends = {method: [run[arguments.loss_steps] for run in runs] for method, runs in losses.items()}
        report["final_loss"] = {method: {"mean": statistics.fmean(end), "values": end} for method, end in ends.items()}
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"memory": report["memory"], "final_loss": report["final_loss"]}, indent=1))


if __name__ == "__main__":
    main()
