"""Models of transformers for tables of predictions: settings drawn by seed, and the directories that they name, with random weights.

A setting names its files below FILES; `located` makes them in a folder and puts its name there, so that rows are the same on every machine.
"""

import json
import random
from pathlib import Path
from typing import Any

FILES = "FILES"
FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt2")
METHODS = ("none", "lora", "qlora")
UPDATES = ("accumulate", "layerwise")
LEAST, MOST = 5_000_000, 60_000_000  # numbers of a model
FLOPS_PER_STEP = 2e11
VOCABULARIES = (4000, 8000, 16000, 32000)
_TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n"
_TOKENIZER_ROWS = 300


def draw(seed: int | str, number: int) -> list[str]:
    """Settings of one row, by seed and number only. Families, methods and updates come in turn, so that 24 rows have every combination."""
    from lowmem.config.load import load_run_config
    from lowmem.system.errors import ConfigError

    for attempt in range(1000):
        rng = random.Random(f"transformers {seed} {number} {attempt}")
        shape, settings = _draw_once(rng, number)
        try:
            config = load_run_config(overrides=["train.steps=2", *settings])
        except ConfigError:
            continue
        parameters = estimated_parameters(*shape)
        tokens = config.train.global_batch_size * config.data.seq_len
        if LEAST <= parameters <= MOST and 6 * parameters * tokens <= FLOPS_PER_STEP:
            return settings
    raise SystemExit(f"no settings for row {number} of seed {seed}")


def _draw_once(rng: random.Random, number: int) -> tuple[tuple[str, int, int, int], list[str]]:
    """A shape (family, width, layers, vocabulary) and the settings, of which some contradict each other."""
    family, method = FAMILIES[number % 4], METHODS[number // 4 % 3]
    if (family, method) == ("gpt2", "qlora"):  # its layers are of its own kind, which NF4 does not store
        family = "llama"
    width, layers, vocabulary = rng.randrange(128, 769, 64), rng.randint(2, 12), rng.choice(VOCABULARIES)
    half, bits, micro = rng.choice([True, False]), rng.choice([32, 8, 4]), rng.choice([1, 2, 4])
    kind = rng.choice(["text", "chat"])
    precision = "bf16" if half else "fp32"
    settings = {
        "model.path": f"{FILES}/{family}-{width}-{layers}-{vocabulary}", "data.kind": kind,
        "data.seq_len": rng.choice([64, 128, 256, 512]), "optim.state_bits": bits, "train.update": UPDATES[number // 12 % 2],
        "train.precision": precision, "train.weight_dtype": "nf4" if method == "qlora" else precision,
        "train.activation_checkpointing": rng.choice(["block", "none"]), "train.micro_batch_size": micro,
        "train.global_batch_size": micro * rng.choice([1, 2, 4]), "adapter.method": "none" if method == "none" else "lora",
    }  # fmt: skip
    if method != "none":
        settings["adapter.r"] = rng.choice([4, 16, 64])
    if kind == "chat":
        settings["data.sources"] = f"[{{path: {FILES}/chat.jsonl}}]"
    return (family, width, layers, vocabulary), [f"{key}={value}" for key, value in settings.items()]


def estimated_parameters(family: str, width: int, layers: int, vocabulary: int) -> int:
    """Numbers of the model, norms and biases left out."""
    matrices = 12 if family == "gpt2" else 4 + 3 * 3
    return matrices * layers * width**2 + (1 if family in ("gpt2", "gemma3_text") else 2) * vocabulary * width


def located(settings: list[str], folder: Path) -> list[str]:
    """The settings with the files that they name, which are made where they are not there yet."""
    for setting in settings:
        for name in ("model.path=", "data.sources="):
            if setting.startswith(name) and FILES in setting:
                _make(setting.partition(f"{FILES}/")[2].rstrip("}]"), folder)
    return [setting.replace(FILES, str(folder)) for setting in settings]


def _make(name: str, folder: Path) -> None:
    place = folder / name
    if place.exists():
        return
    if name == "chat.jsonl":
        records = [{"prompt": f"what is {n}? {_TEXT * (n % 3)}", "response": f"it is {n}. {_TEXT * (n % 5)}"} for n in range(400)]
        place.write_text("\n".join(map(json.dumps, records)))
        return
    family, width, layers, vocabulary = name.split("-")
    make_directory(place, family, int(width), int(layers), int(vocabulary))


def make_directory(place: Path, family: str, width: int, layers: int, vocabulary: int) -> None:
    """A model of random weights and a tokenizer, as save_pretrained writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

    heads = width // 64 if width >= 256 else width // 32
    shape: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": width // heads, "intermediate_size": 3 * width, "max_position_embeddings": 1024, "sliding_window": 128,
    }  # fmt: skip
    if family == "gpt2":
        shape = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024}
    elif family != "gemma3_text":
        del shape["sliding_window"]
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=vocabulary, **ends, **shape)).save_pretrained(place)
    HuggingFaceTokenizer.train([_TEXT * 50], _TOKENIZER_ROWS).save(place / "tokenizer.json")
