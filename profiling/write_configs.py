"""Writes the configurations by hardware budget: what `lowmem plan` chooses for each, with its prediction in a comment.

    python profiling/write_configs.py            # configs/cpu/*gib*.yaml, configs/gpu/*gib*.yaml, configs/gpu/t4_200m.yaml

A file says what differs from the defaults, in the words of the template below; `lowmem plan --config FILE` plans it anew for your machine.
"""

import argparse
import copy
from pathlib import Path

from lowmem.config.load import load_run_config
from lowmem.planning.levers import get_key
from lowmem.planning.predict import Prediction
from lowmem.planning.search import plan
from lowmem.system.errors import MemoryBudgetError
from lowmem.system.units import format_count

ROOT = Path(__file__).parent.parent
# name: parameters, width, MLP width, layers, heads, vocabulary
MODELS = {
    "42m": (512, 1408, 8, 8, 16000),
    "215m": (1024, 2688, 12, 16, 32000),
    "361m": (1024, 2688, 24, 16, 32000),
    "1b": (2048, 5632, 22, 16, 32000),
    "3b": (3072, 8192, 28, 24, 32000),
}
# file: model, sequence, global batch, tokens, RAM, VRAM, precision
FILES = {
    "cpu/1gib_42m.yaml": ("42m", 256, 16, "50M", "1GiB", "", "bf16"),
    "cpu/2gib_215m.yaml": ("215m", 512, 16, "100M", "2GiB", "", "bf16"),
    "cpu/4gib_215m.yaml": ("215m", 512, 16, "100M", "4GiB", "", "bf16"),
    "cpu/8gib_361m.yaml": ("361m", 512, 16, "200M", "8GiB", "", "bf16"),
    "gpu/4gib_215m.yaml": ("215m", 1024, 64, "4B", "8GiB", "3.4GiB", "bf16"),
    "gpu/6gib_361m.yaml": ("361m", 1024, 64, "7B", "8GiB", "5.4GiB", "bf16"),
    "gpu/8gib_1b.yaml": ("1b", 1024, 64, "20B", "16GiB", "7.2GiB", "bf16"),
    "gpu/12gib_1b.yaml": ("1b", 2048, 64, "20B", "16GiB", "11GiB", "bf16"),
    "gpu/16gib_1b.yaml": ("1b", 2048, 128, "20B", "32GiB", "15GiB", "bf16"),
    "gpu/24gib_3b.yaml": ("3b", 2048, 128, "60B", "32GiB", "23GiB", "bf16"),
    "gpu/t4_200m.yaml": ("215m", 1024, 64, "4B", "12GiB", "9GB", "fp16"),
}
TEMPLATE = """# {parameters} parameters {place}: what `lowmem plan` chose{why}.
#
#   predicted peak of RAM   {ram}{vram}
#   {speed}
#
#   lowmem pretrain --config configs/{file} --data.sources='[{{path: "texts/*.jsonl.zst"}}]'

run_dir: runs/{stem}
device: {device}

budget:                   # enforced; a run that would not fit does not start
{budget}

model:
  name: decoder
  dim: {dim}
  hidden_dim: {hidden}
  num_layers: {layers}
  num_heads: {heads}
  vocab_size: {vocabulary}
  positions: rope
  norm: rmsnorm
  activation: swiglu

data:
  sources:
{source}
  tokenizer: bpe
  tokenizer_vocab_size: {vocabulary}
  seq_len: {seq_len}

optim:
  name: adamw
  lr: {lr}
  state_bits: {state_bits}           # of optimizer states; see README, "less memory"
  warmup_steps: 500
  schedule: wsd

train:
  tokens: {tokens}
  global_batch_size: {global_batch_size}
  micro_batch_size: {micro_batch_size}
  update: {update}
  activation_checkpointing: {activation_checkpointing}
  precision: {precision}
  weight_dtype: {weight_dtype}
  save_every: 100
  eval_every: 200
"""


HUB = """    - hub: HuggingFaceFW/fineweb-edu
      subset: sample-10BT
      streaming: true     # tokenised on the fly, nothing stored"""


def main() -> None:
    """Plan every file and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name contains this")
    arguments = parser.parse_args()
    for file in FILES:
        if arguments.only in file:
            prediction = planned(file)
            (ROOT / "configs" / file).write_text(text(file, prediction))
            print(f"{file:24} {'; '.join(prediction.lines())}", flush=True)


def planned(file: str) -> Prediction:
    """The plan for one file.

    Raises:
        MemoryBudgetError: nothing fits.
    """
    model, seq_len, batch, tokens, ram, vram, precision = FILES[file]
    dim, hidden, layers, heads, vocabulary = MODELS[model]
    config = copy.deepcopy(load_run_config(overrides=[f"train.tokens={tokens}"]))
    shape, data, train = config.model, config.data, config.train
    shape.dim, shape.hidden_dim, shape.num_layers, shape.num_heads, shape.vocab_size = dim, hidden, layers, heads, vocabulary
    data.seq_len, data.tokenizer_vocab_size = seq_len, vocabulary
    train.global_batch_size, train.precision = batch, precision  # type: ignore[assignment]
    config.budget.ram, config.budget.vram = ram, vram
    config.device = "cuda" if vram else "cpu"
    found = plan(config, alternatives=0)
    if not found.fits:
        raise MemoryBudgetError(f"{file}: lacks {found.missing}")
    return found.prediction


def text(file: str, prediction: Prediction) -> str:
    """The YAML of one plan."""
    model, seq_len, batch, tokens, ram, vram, _ = FILES[file]
    dim, hidden, layers, heads, vocabulary = MODELS[model]
    chosen = {
        key.partition(".")[2]: get_key(prediction.config, key)
        for key in (
            "optim.state_bits", "train.micro_batch_size", "train.update", "train.activation_checkpointing", "train.precision",
            "train.weight_dtype",
        )
    }  # fmt: skip
    lines = prediction.lines()
    target = file.endswith("t4_200m.yaml")
    size = "16 GB, in under 9 GB" if target else f"{Path(file).name.partition('gib')[0]} GiB"
    return TEMPLATE.format(
        parameters=format_count(prediction.parameters),
        place=f"on a GPU with {size}" if vram else f"on a CPU, in {ram} of RAM",
        why=", fp16 because a T4 has no bf16; predicted, not yet measured on a T4" if target else "",
        ram=lines[1].partition(": ")[2],
        vram=f"\n#   predicted peak of VRAM  {lines[2].partition(': ')[2]}" if vram else "",
        speed="not yet measured on a GPU" if vram else f"{prediction.tokens_per_s:,.0f} tokens/s predicted, on two cores",
        file=file, stem=Path(file).stem, device="cuda" if vram else "cpu",
        budget="\n".join(f"  {name}: {size}" for name, size in (("ram", ram), ("vram", vram)) if size),
        source=HUB if vram else "    - stdlib: true        # enough to try it; replace by your own text",
        dim=dim, hidden=hidden, layers=layers, heads=heads, vocabulary=vocabulary, seq_len=seq_len, tokens=tokens, global_batch_size=batch,
        lr="3.0e-4" if dim > 1024 else "6.0e-4" if dim == 1024 else "1.0e-3", **chosen,
    )  # fmt: skip


if __name__ == "__main__":
    main()
