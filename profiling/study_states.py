"""Does training with 8-bit and 4-bit optimizer states, and with bf16 weights, end at the loss of fp32 AdamW? On real text.

    python profiling/study_states.py --text FILE --out profiling/results         # hours on two cores
    python profiling/study_states.py --parts lr --steps 200                      # a quick look, on the standard library's text

Parts, each adding to results/study_states.json; a run that is there already is not repeated:

    lr        fp32 AdamW over learning rates; the best one is used by everything after
    main      fp32, 8-bit and 4-bit states with fp32 weights and with bf16 weights (stochastic rounding), three seeds
    twice     the same at twice the learning rate, one seed
    tensors   4-bit states with one kind of tensor at 32 bits: which of them need more; and bf16 weights with 32-bit states
    rounding  4-bit states with other roundings, by the definition in PyTorch instead of the compiled kernels
    lion      Lion with 32 and 8 bits
    4096      fp32, 8-bit and 4-bit AdamW, 32- and 8-bit Lion with 4,096 tokens a step instead of 512: one seed, as many tokens in all, but
              at least 100 steps
    32768     the same with 32,768 tokens a step

A file of another shape is refused. Two runs go on at once, one thread each. Same seed, same data order, same initial weights.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MODEL = {"dim": 256, "hidden_dim": 640, "num_layers": 4, "num_heads": 4, "vocab_size": 8192}
SEQ_LEN, GLOBAL_BATCH, EVAL_SEQUENCES = 64, 8, 512
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
FEWEST_STEPS = 100
MOST_LR = 4.0  # times the best learning rate of small batches
LION_SHARE = 0.2  # of AdamW's learning rate
LARGE = {"4096": 4096 // SEQ_LEN, "32768": 32768 // SEQ_LEN}  # sequences a step
MICRO_BATCH = 64  # sequences computed at once
BASE = {"name": "adamw", "bits": 32, "weights": "fp32"}
VARIANTS = {
    "fp32": BASE,
    "8-bit": {**BASE, "bits": 8},
    "4-bit": {**BASE, "bits": 4},
    "bf16, 8-bit": {**BASE, "bits": 8, "weights": "bf16"},
    "bf16, 4-bit": {**BASE, "bits": 4, "weights": "bf16"},
}
TENSORS = ("embedding", "head", "attention", "mlp")
PARTS = ["lr", "main", "twice", "tensors", "rounding", "lion", *LARGE]
ROUNDINGS = (
    "exp_avg_sq to nearest", "exp_avg to nearest", "exp_avg_sq in powers of two", "exp_avg_sq may be zero", "betas 0.9, 0.999"
)  # fmt: skip


def main() -> None:
    """Parse the command line, run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--text", default="", help="a text file; empty takes the standard library's own text")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="folder of study_states.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(train(json.loads(arguments.child))))
        return
    study = Study(arguments)
    best = study.learning_rate()
    for part in arguments.parts:
        if part != "lr":
            study.run(settings_of(part, best))
    print(json.dumps(study.summary(), indent=1))


def settings_of(part: str, lr: float) -> dict[str, dict]:
    """Runs of one part, by name."""
    if part == "main":
        return {f"{name}, seed {seed}": {**variant, "lr": lr, "seed": seed} for seed in SEEDS for name, variant in VARIANTS.items()}
    if part == "twice":
        return {f"{name}, twice the lr": {**variant, "lr": 2 * lr, "seed": 0} for name, variant in VARIANTS.items()}
    if part == "tensors":
        return {f"4-bit, {one} at 32": {**VARIANTS["4-bit"], "lr": lr, "seed": 0, "wide": one} for one in TENSORS} | {
            "bf16, 32-bit": {**BASE, "weights": "bf16", "lr": lr, "seed": 0}
        }
    if part == "rounding":
        return {f"4-bit, {one}": {**VARIANTS["4-bit"], "lr": lr, "seed": 0, "rounding": one} for one in ROUNDINGS} | {
            "fp32, betas 0.9, 0.999": {**BASE, "lr": lr, "seed": 0, "betas": [0.9, 0.999]}
        }
    lion = {"name": "lion", "weights": "fp32", "lr": lr * LION_SHARE, "seed": 0, "betas": [0.9, 0.99]}
    lions = {f"lion, {bits}-bit": {**lion, "bits": bits} for bits in (32, 8)}
    if part == "lion":
        return lions
    # the noise of a gradient falls with the root of its batch; so may the learning rate rise
    grown = math.sqrt(LARGE[part] / GLOBAL_BATCH)
    runs = {name: {**VARIANTS[name], "lr": lr, "seed": 0} for name in ("fp32", "8-bit", "4-bit")} | lions
    return {f"{name}, {part} tokens": {**run, "lr": run["lr"] * min(grown, MOST_LR), "batch": LARGE[part]} for name, run in runs.items()}


class Study:
    """Runs by name, on disk after each of them."""

    def __init__(self, arguments: argparse.Namespace):
        self.text, self.steps = arguments.text, arguments.steps
        self.path = arguments.out and arguments.out / "study_states.json"
        self.runs: dict[str, dict] = {}
        if self.path and self.path.exists():
            document = json.loads(self.path.read_text())
            if document["shape"] != self.shape():
                raise SystemExit(f"{self.path} has runs of {document['shape']}, not of {self.shape()}; move it, or choose another --out")
            self.runs = document["runs"]

    def learning_rate(self) -> float:
        """The best of LEARNING_RATES for fp32."""
        names = {lr: f"fp32, lr {lr:g}" for lr in LEARNING_RATES}
        self.run({name: {**BASE, "lr": lr, "seed": 0} for lr, name in names.items()})
        return min(LEARNING_RATES, key=lambda lr: self.runs[names[lr]]["val_loss"])

    def run(self, settings: dict[str, dict]) -> None:
        """Those that are not there yet, two at a time."""
        missing = [(name, setting) for name, setting in settings.items() if name not in self.runs]
        with ThreadPoolExecutor(2) as pool:
            for name, result in zip([n for n, _ in missing], pool.map(lambda pair: self._child(pair[1]), missing), strict=True):
                self.runs[name] = result
                print(f"{name}: {result['val_loss']:.4f} ({result['seconds']:.0f} s)", file=sys.stderr, flush=True)
                self._write()

    def _child(self, setting: dict) -> dict:
        setting = {**setting, "steps": self.steps, "text": self.text}
        command = [sys.executable, __file__, "--child", json.dumps(setting)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"{setting} failed:\n{result.stderr[-2000:]}")
        found = json.loads(result.stdout.splitlines()[-1])
        return {"setting": {key: value for key, value in setting.items() if key != "text"}, **found}

    def summary(self) -> dict:
        """Validation loss of each variant over its seeds, and its distance from fp32, paired by seed, in per cent."""
        table = {}
        for variant in VARIANTS:
            losses = {seed: self.runs[f"{variant}, seed {seed}"]["val_loss"] for seed in SEEDS if f"{variant}, seed {seed}" in self.runs}
            if losses:
                percent = [100 * (loss / self.runs[f"fp32, seed {seed}"]["val_loss"] - 1) for seed, loss in losses.items()]
                table[variant] = {
                    "val_loss": round(statistics.mean(losses.values()), 4),
                    "percent_above_fp32": round(statistics.mean(percent), 3),
                    "by_seed": [round(p, 3) for p in percent],
                }
        for part in LARGE:
            for name in ("8-bit", "4-bit", "lion, 8-bit"):
                wide = "lion, 32-bit" if name.startswith("lion") else "fp32"
                one, other = (self.runs.get(f"{each}, {part} tokens") for each in (name, wide))
                if one and other:
                    percent_above = round(100 * (one["val_loss"] / other["val_loss"] - 1), 3)
                    table[f"{name}, {part} tokens"] = {"val_loss": one["val_loss"], "percent_above_32_bits": percent_above}
        return table

    def _write(self) -> None:
        from machine import describe_machine

        if self.path:
            document = {"machine": describe_machine(), "shape": self.shape(), "summary": self.summary(), "runs": self.runs}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(document, indent=1) + "\n")

    def shape(self) -> dict:
        """What all runs of one file have in common."""
        text = Path(self.text).name if self.text else "the standard library"
        return {**MODEL, "seq_len": SEQ_LEN, "global_batch_size": GLOBAL_BATCH, "steps": self.steps, "text": text}


def train(setting: dict) -> dict:
    """In the child: one run."""
    import torch

    from lowmem.config.schema import DataConfig, ModelConfig, OptimConfig, SourceConfig
    from lowmem.data.batch import Batch
    from lowmem.data.prepare import prepare_data
    from lowmem.engine.local import LocalEngine
    from lowmem.models.registry import build_model
    from lowmem.optim.from_config import learning_rate

    torch.set_num_threads(1)
    source = SourceConfig(path=setting["text"]) if setting["text"] else SourceConfig(stdlib=True)
    data = prepare_data(DataConfig(sources=[source], tokenizer_vocab_size=MODEL["vocab_size"], seq_len=SEQ_LEN), seed=setting["seed"])
    model = build_model(ModelConfig(**MODEL), vocab_size=MODEL["vocab_size"], max_seq_len=SEQ_LEN, seed=setting["seed"])
    parameters = model.num_parameters()
    if setting["weights"] == "bf16":
        model = model.to(torch.bfloat16)
    optim = OptimConfig(name=setting["name"], lr=setting["lr"], state_bits=setting["bits"], betas=tuple(setting.get("betas", (0.9, 0.95))))
    change_rounding(setting.get("rounding", ""), optim)
    rows = setting.get("batch", GLOBAL_BATCH)
    steps = max(min(FEWEST_STEPS, setting["steps"]), setting["steps"] * GLOBAL_BATCH // rows)
    optim.warmup_steps = min(optim.warmup_steps, steps // 10)
    settings = {"device": torch.device("cpu"), "precision": "bf16", "micro_batch_size": min(rows, MICRO_BATCH), "seed": setting["seed"]}
    engine = LocalEngine(model, optim, **settings)
    if setting.get("wide"):
        engine.optimizer = with_wide(model, engine.optimizer, setting["wide"])
    started, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        batch = Batch.from_windows(data.train.next(rows))
        losses.append(engine.step(batch, learning_rate(optim, step, steps)).loss)
    val_loss = engine.evaluate(Batch.from_windows(part) for part in data.validation.windows(EVAL_SEQUENCES))
    return {
        "val_loss": round(val_loss, 5),
        "train_loss_last_100": round(statistics.mean(losses[-100:]), 5),
        "steps_taken": steps,
        "finite": all(math.isfinite(loss) for loss in losses),
        "parameters": parameters,
        "seconds": round(time.perf_counter() - started, 1),
    }


def with_wide(model, optimizer, component: str):
    """The same optimizer with 32-bit states for every tensor whose name contains `component`."""
    wide = {id(p) for name, p in model.named_parameters() if component in name}
    groups = []
    for group in optimizer.param_groups:
        for bits, chosen in ((32, True), (group["state_bits"], False)):
            parameters = [p for p in group["params"] if (id(p) in wide) == chosen]
            if parameters:
                groups.append({**group, "params": parameters, "state_bits": bits})
    return type(optimizer)(groups, seed=optimizer.seed)


def change_rounding(name: str, optim) -> None:
    """Replace a part of the definition, and have it run instead of the compiled kernels."""
    if name in ("", "betas 0.9, 0.999"):
        optim.betas = (0.9, 0.999) if name else optim.betas
        return
    import torch

    from lowmem.optim.kernels import cpu, reference
    from lowmem.optim.kernels.formats import FORMATS, Format

    cpu.step_ = reference.step_
    encode_signed, encode_unsigned, decode_unsigned = reference.encode_signed, reference.encode_unsigned, reference.decode_unsigned

    def to_nearest(value, bits, fmt):
        return encode_unsigned(value, torch.full_like(bits, 0x8000_0000), fmt)

    def average_to_nearest(value, bits, fmt):
        """Moves each value to the nearest code's before it is rounded."""
        square = float(fmt.signed_max**2)
        inverse = square / value.abs().amax(1, keepdim=True).clamp_min(1e-30)
        code = (value.abs() * inverse).sqrt().round()
        return encode_signed(value.sign() * code.square() / inverse, torch.full_like(bits, 0x8000_0000), fmt)

    def with_zero(stored, scale, fmt):
        smallest = decode_unsigned(torch.zeros_like(stored), scale, fmt)
        value = decode_unsigned(stored, scale, fmt)
        return torch.where(value <= smallest, 0.0, value)

    if name == "exp_avg_sq to nearest":
        reference.encode_unsigned = to_nearest
    elif name == "exp_avg to nearest":
        reference.encode_signed = average_to_nearest
    elif name == "exp_avg_sq in powers of two":
        FORMATS[4] = Format(bits=4, signed_max=7, unsigned_max=15, shift=23)
    elif name == "exp_avg_sq may be zero":
        reference.decode_unsigned = with_zero


if __name__ == "__main__":
    main()
