"""QLoRA against LoRA on this CPU: the difference of their peaks, predicted and measured, and their losses over several seeds.

    python profiling/qlora_memory.py --data chat.json --out profiling/results/qlora_memory.json

The base is a Llama of random weights and about `--parameters` numbers, for memory alone needs no training; the losses are those of a base
that was trained, `--loss_base`. Every run has a process of its own.
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


def finetune(base: Path, data: str, out: Path, method: str, steps: int, seed: int, seq_len: int) -> dict:
    """Peak, prediction and losses of one run in a fresh process."""
    command = [
        sys.executable, "-m", "lowmem", "finetune", "--quiet", f"--base={base}", f"--data={data}", f"--out={out}", f"--method={method}",
        f"--steps={steps}", f"--eval_every={max(1, steps // 5)}", "--save_every=0", f"--seed={seed}", f"--seq_len={seq_len}",
        "--optim.lr=0.002", "--batch_size=4", "--micro_batch_size=1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((out / "result.json").read_text())
    return {"peak_bytes": report["training_peak_bytes"], "losses": report["losses"]}


def predicted_base(base: Path, data: str, method: str) -> int:
    """Bytes of the frozen weights, by arithmetic."""
    from lowmem.config.finetune import FinetuneConfig
    from lowmem.finetune.memory import predict_memory

    return predict_memory(FinetuneConfig(base=str(base), data=data, method=method), base).components["base"]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--loss_base", required=True, help="run directory, for the losses and the tokenizer")
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
        saved = predicted_base(base, arguments.data, "lora") - predicted_base(base, arguments.data, "qlora")
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
        last = str(arguments.loss_steps)
        ends = {method: [run[last] for run in runs] for method, runs in losses.items()}
        report["final_loss"] = {method: {"mean": statistics.fmean(end), "values": end} for method, end in ends.items()}
    Path(arguments.out).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"memory": report["memory"], "final_loss": report["final_loss"]}, indent=1))


if __name__ == "__main__":
    main()
