"""What lowmem does with families of transformers, checked on tiny models with random weights: the table of docs/models.md.

    python profiling/models_table.py --page docs/models.md         # a quarter of an hour on two cores
    python profiling/models_table.py --only "Qwen3" --no_runs      # the columns that need no process of their own

A number is the largest difference from the definition, relative to the largest value: from the family's own eager forward pass (logits,
loss and gradients), between one micro-batch and several (accumulate), between the two updates after a step (layerwise), between a merged
adapter as transformers reloads it and the adapter beside its base (lora merged), between NF4 layers and the dense numbers they stand for
(NF4). Both sides add the same numbers in another order. "yes" says that two texts or weights are equal.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent))  # the shapes are those that the tests use
from lowmem.config.schema import AdapterConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.models.base import LossOptions
from lowmem.models.huggingface import HuggingFaceModel
from tests.reference.tiny_families import SHAPES

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.2 (rope_type llama3, tied)": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Llama 3.1 (untied)": ("llama", {"rope_parameters": LLAMA3}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Mistral (sliding window)": ("mistral", {"sliding_window": 5}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma 2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **WINDOWS}),
    "Gemma 3 (text)": ("gemma3_text", WINDOWS),
    "Phi-3": ("phi3", {}),
    "Phi-4-mini (partial rotary)": ("phi3", {"partial_rotary_factor": 0.5}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {}),
    "GPT-2": ("gpt2", {}),
    "Pythia (GPT-NeoX)": ("gpt_neox", {}),
    "Falcon-H1 (hybrid)": ("falcon_h1", {}),
}
TWO_RANKS = ("Llama 3.2 (rope_type llama3, tied)", "Gemma 3 (text)", "GPT-2")
RECURRENT = ("Falcon-H1 (hybrid)",)
COLUMNS = (
    "logits", "loss and gradients", "accumulate", "layerwise = accumulate", "lora merged = unmerged", "NF4", "ZeRO-2, two ranks",
    "peak, measured over predicted", "generate", "export and reload",
)  # fmt: skip
ROUNDINGS = 5_000 * 2**-24  # what differences may be: some hundred roundings a layer, more where large terms cancel
CPU = torch.device("cpu")


class Case:
    """A family as a directory, and what is asked of it.

    Args:
        folder: for its files.
    """

    def __init__(self, title: str, folder: Path):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.title, self.folder, self.path = title, folder, folder / "model"
        family, choices = FAMILIES[title]
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **(SHAPES[family] | choices)), attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
            self.model.get_input_embeddings().weight[7] *= 10  # one token is louder than all others
        self.model.eval().save_pretrained(self.path)
        write_tokenizer(self.path)

    def engine(self, update: str = "accumulate", micro: int = 2, **more: Any) -> Any:
        """The engine of a run on the directory; `more` are sections or values of `train`."""
        adapter = more.pop("adapter", AdapterConfig())
        train = TrainConfig(**{"precision": "fp32", "update": update, "activation_checkpointing": "block", **more})
        model = ModelConfig(path=str(self.path), max_seq_len=64)
        config = RunConfig(model=model, adapter=adapter, train=train, optim=OptimConfig(lr=1e-2, clip=0.0))
        config.data.seq_len = 12
        return build_local_engine(config, build_configured_model(config), CPU, "fp32", micro)


def write_tokenizer(path: Path) -> None:
    """A tokenizer of 300 tokens and a template."""
    from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

    HuggingFaceTokenizer.train(["some words and the other words " * 20], 300).save(path / "tokenizer.json")
    template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|endoftext|>"}))


def tokens(rows: int = 4, time: int = 13, seed: int = 0) -> np.ndarray:
    """Half of them are one frequent token, as in text."""
    random = np.random.default_rng(seed)
    found = random.integers(3, 300, (rows, time))
    found[random.random((rows, time)) < 0.4] = 7
    return found


def batch(seed: int = 0) -> Batch:
    """Rows that predict different numbers of tokens."""
    made = Batch.from_windows(tokens(seed=seed))
    targets = made.targets.copy()
    for row in range(len(targets)):
        targets[row, : 3 * row] = IGNORE_INDEX
    return Batch(made.inputs, targets)


def shown(difference: float) -> str:
    """A difference as a cell; beyond the rounding of fp32 it is no equality.

    Raises:
        AssertionError: it is too large.
    """
    assert difference <= ROUNDINGS, f"{difference:.2e} is beyond {ROUNDINGS:.2e}"
    return f"{difference:.0e}" if difference else "0"


def apart(found: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> float:
    """The largest difference, relative to the largest value."""
    return (found.float() - expected.float()).abs().max().item() / max(scale, expected.abs().max().item(), 1e-30)


def logits(case: Case) -> str:
    """Against the model's own."""
    inputs = torch.from_numpy(tokens())
    with torch.no_grad():
        return shown(
            apart(HuggingFaceModel(copy.deepcopy(case.model)).eval()(inputs), case.model(input_ids=inputs, use_cache=False).logits)
        )


def loss_and_gradients(case: Case) -> str:
    """Against autograd through the model's own forward pass."""
    theirs, ours = copy.deepcopy(case.model), HuggingFaceModel(copy.deepcopy(case.model))
    ours.loss_options = LossOptions(chunk_tokens=5)
    given = batch()
    inputs, targets = torch.from_numpy(given.inputs), torch.from_numpy(given.targets)
    expected = F.cross_entropy(theirs(input_ids=inputs, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum") / 7
    found = ours.train()(inputs, targets, 7.0)
    expected.backward()
    found.backward()
    pairs = {name: [p.grad] for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.lm.named_parameters():
        if parameter.grad is not None:
            pairs[name].append(parameter.grad)
    largest = max(pair[0].abs().max().item() for pair in pairs.values())
    differences = [apart(pair[1], pair[0], scale=0.05 * largest) for pair in pairs.values()]
    return shown(max(abs(found.item() - expected.item()) / abs(expected.item()), *differences))


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """What is trained, by name."""
    return {name: p.detach().clone() for name, p in engine.model.named_parameters() if p.requires_grad}


def gradients(engine: Any, given: Batch) -> dict[str, torch.Tensor]:
    """What a step would apply, by name."""
    engine.model.train()
    engine._accumulate(given)
    return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}


def accumulate(case: Case) -> str:
    """Gradients of one micro-batch against those of four."""
    whole, parts = gradients(case.engine(micro=4), batch()), gradients(case.engine(micro=1), batch())
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    return shown(max(apart(parts[name], gradient, scale=0.05 * largest) for name, gradient in whole.items()))


def layerwise(case: Case) -> str:
    """Gradients that a layerwise step applies, against those of an accumulated one; micro-batches of one."""
    expected, engine, found = gradients(case.engine(micro=1), batch()), case.engine("layerwise", micro=1), {}
    names = {parameter: name for name, parameter in engine.model.named_parameters()}

    def keep(parameter: Any, window: Any, grad: torch.Tensor, *, start: int = 0, grad_scale: float = 1.0) -> None:
        whole = found.setdefault(names[parameter], torch.zeros(parameter.numel()))
        whole[start : start + grad.numel()] += grad.flatten() * grad_scale

    engine.optimizer.apply = keep
    engine.step(batch(), 1e-3)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    return shown(max(apart(found[name], gradient.flatten(), scale=0.05 * largest) for name, gradient in expected.items()))


def adapted(case: Case, **more: Any) -> Any:
    """A model with LoRA whose B factors are not zero."""
    model = case.engine(adapter=AdapterConfig(method="lora", r=4), **more).model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def lora_merged(case: Case) -> str:
    """The merged directory as transformers loads it, against the adapter beside its base."""
    from transformers import AutoModelForCausalLM

    from lowmem.export.adapters import save_merged

    model, inputs = adapted(case), torch.from_numpy(tokens())
    save_merged(model, case.path, case.folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(case.folder / "merged", attn_implementation="eager")
    with torch.no_grad():
        return shown(apart(merged(input_ids=inputs, use_cache=False).logits, model(inputs)))


def nf4(case: Case) -> str:
    """LoRA above NF4 layers against the dense numbers that they stand for."""
    from lowmem.nn.quantized import dense

    model, inputs = adapted(case, weight_dtype="nf4"), torch.from_numpy(tokens())
    with torch.no_grad():
        found = model(inputs)
        for module in model.lm.modules():
            if type(module).__name__ == "Nf4Linear":
                whole = torch.nn.Parameter(dense(module.weight, torch.float32), requires_grad=False)
                module.__class__, module.weight = torch.nn.Linear, whole
        return shown(apart(model(inputs), found))


def command(*words: str, ranks: int = 1) -> str:
    """Standard output of `lowmem`, in a process of its own or in several under DeepSpeed's launcher."""
    start = [sys.executable, "-m", "lowmem"]
    if ranks > 1:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        start = [launcher, "-q", "--no_local_rank", "--master_port", "29517", "--num_gpus", str(ranks), "--module", "lowmem"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([*start, *words], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{' '.join(words)}: {result.stderr[-600:]}"
    return result.stdout


def run_settings(case: Case, name: str, model: Path, *more: str) -> list[str]:
    """A short run on random words."""
    words = np.random.default_rng(0).choice(["some", "words", "and", "the", "other"], 4000)
    (case.folder / "text.txt").write_text(" ".join(words))
    return [
        "pretrain", "--quiet", f"--model.path={model}", f"--data={case.folder / 'text.txt'}", f"--data.cache_dir={case.folder / 'cache'}",
        "--data.val_fraction=0.1", "--train.steps=3", "--train.global_batch_size=4", "--train.micro_batch_size=2", "--train.eval_every=3",
        "--optim.warmup_steps=0", "--device=cpu", f"--run_dir={case.folder / name}", *more,
    ]  # fmt: skip


def losses(folder: Path) -> list[float]:
    """Of every step of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def zero_2(case: Case) -> str:
    """Losses of three steps on two ranks against one process."""
    if case.title not in TWO_RANKS:
        return "not run: three families are"
    same = ["--data.seq_len=32", "--train.precision=fp32"]
    command(*run_settings(case, "one", case.path, *same))
    command(*run_settings(case, "two", case.path, *same, "--engine.name=deepspeed", "--engine.zero_stage=2"), ranks=2)
    one, two = losses(case.folder / "one"), losses(case.folder / "two")
    return shown(max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)))


def memory(case: Case) -> str:
    """A LoRA run of a wider model of the family: measured over predicted peak."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, choices = FAMILIES[case.title]
    wide = {
        "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "n_embd": 512,
        "n_head": 8, "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "num_hidden_layers": 6, "n_layer": 6, "n_positions": 512,
        "max_position_embeddings": 512, "layer_types": ["sliding_attention", "full_attention"] * 3, "no_rope_layers": [1, 0] * 3,
    }  # fmt: skip
    shape = SHAPES[family] | choices
    config = AutoConfig.for_model(family, **(shape | {key: value for key, value in wide.items() if key in shape}))
    path = case.folder / "wide"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    write_tokenizer(path)
    more = ["--data.seq_len=256", "--train.precision=fp32", "--adapter.method=lora", "--adapter.merge=false", "--budget.ram=20GiB"]
    command(*run_settings(case, "memory", path, *more))
    report = json.loads((case.folder / "memory" / "memory.json").read_text())
    return f"{report['measured']['host_peak_bytes'] / report['predicted']['host_peak_bytes'] - 1:+.1%}".replace("%", " %")


def generate(case: Case) -> str:
    """Greedy text of the command against transformers' own generate."""
    prompt = "some words and"
    text = json.loads(
        command("generate", "--run", str(case.path), "--prompt", prompt, "--temperature=0", "--max_new_tokens=8", "--json", "--device=cpu")
    )
    from lowmem.data.tokenizer_loading import load_tokenizer

    tokenizer = load_tokenizer(case.path)
    ids = torch.tensor([tokenizer.encode(prompt)])
    ends = [tokenizer.eos_id, case.model.generation_config.eos_token_id]  # either ends a text
    with torch.no_grad():
        found = case.model.generate(
            ids, do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=0, attention_mask=torch.ones_like(ids),
            suppress_tokens=list(range(tokenizer.vocab_size, case.model.config.vocab_size)),  # rows that no token has
        )  # fmt: skip
    own = [token for token in found[0, ids.shape[1] :].tolist() if token not in ends]
    assert tokenizer.decode(own) in (text["text"], text.get("completion")), f"{tokenizer.decode(own)!r} and {text}"
    return "yes"


def export(case: Case) -> str:
    """A run on the directory, exported, and loaded by transformers: its weights are the run's."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    command(*run_settings(case, "full", case.path, "--data.seq_len=32", "--train.precision=fp32", "--adapter.merge=false"))
    command("export", "--run", str(case.folder / "full"), "--out", str(case.folder / "exported"))
    saved = load_file(case.folder / "full" / "checkpoints" / "step-00000003" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(case.folder / "exported").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    return "yes"


CHECKS: dict[str, Callable[[Case], str]] = dict(
    zip(COLUMNS, (logits, loss_and_gradients, accumulate, layerwise, lora_merged, nf4, zero_2, memory, generate, export), strict=True)
)
RUNS = ("ZeRO-2, two ranks", "peak, measured over predicted", "generate", "export and reload")
NO_LINEAR = "refused: its layers are Conv1D"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def row(title: str, folder: Path, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """The cells of one family; what fails is its reason."""
    case, cells = Case(title, folder), {}
    for column in columns:
        if column == "NF4" and FAMILIES[title][0] == "gpt2":
            cells[column] = NO_LINEAR
            continue
        try:
            cells[column] = CHECKS[column](case)
        except Exception as error:
            cells[column] = f"**no**: {' '.join(str(error).split())[:160]}"
        print(f"{title}, {column}: {cells[column]}", file=sys.stderr, flush=True)
    return cells


def table(rows: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, and where it was measured."""
    import transformers

    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(cells.get(column, 'not run') for column in COLUMNS)} |" for title, cells in rows.items()]
    machine = describe_machine()
    where = f"{machine['date']}, {machine['cpu']}, torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join([*lines, "", f"Written by `profiling/models_table.py`: {where}."])


def main() -> None:
    """Parse the command line, check, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--no_runs", action="store_true", help="only what needs no process of its own")
    parser.add_argument("--rows", type=Path, help="JSON of rows, read and added to: a table in several goes")
    parser.add_argument("--page", type=Path, help="where the table is written between its marks, such as docs/models.md")
    arguments = parser.parse_args()
    columns = tuple(column for column in COLUMNS if not (arguments.no_runs and column in RUNS))
    rows: dict[str, dict[str, str]] = json.loads(arguments.rows.read_text()) if arguments.rows and arguments.rows.exists() else {}
    for title in FAMILIES:
        missing = tuple(column for column in columns if column not in rows.get(title, {}))
        if arguments.only in title and missing:
            with tempfile.TemporaryDirectory(prefix="lowmem-models-") as folder:
                rows[title] = rows.get(title, {}) | row(title, Path(folder), missing)
            if arguments.rows:
                arguments.rows.write_text(json.dumps(rows, indent=1) + "\n")
    text = table({title: rows[title] for title in FAMILIES if title in rows})
    if arguments.page is None:
        print(text)
        return
    before, _, after = arguments.page.read_text().partition(BEGIN)
    arguments.page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after.partition(END)[2]}")


if __name__ == "__main__":
    main()
