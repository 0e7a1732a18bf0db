"""What is settled before anything is loaded: that the folder's run is the same one, its micro-batch, its budget."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lowmem.config.finetune import FinetuneConfig, memory_remedies, micro_batch_sizes
from lowmem.export.tokenizer_files import read_generation_config
from lowmem.finetune.base_model import compute_device, empty_model
from lowmem.finetune.data import read_tokenizer
from lowmem.finetune.families import attention_window, config_positions, learned_positions
from lowmem.finetune.memory import FinetuneMemory, predict_memory
from lowmem.memory.host import granted_memory
from lowmem.memory.limits import limit_cuda_memory, limit_host_memory
from lowmem.system.errors import CheckpointError, ConfigError, MemoryBudgetError
from lowmem.system.files import file_sha256, json_sha256
from lowmem.system.tensors import weight_files
from lowmem.system.units import parse_bytes
from lowmem.train.run_dir import CheckpointStore

_FREE = {"steps", "eval_every", "save_every", "budget", "out", "micro_batch_size", "gradient_checkpointing"}


def earlier_micro_batch(config: FinetuneConfig, folder: Path) -> int:
    """The micro-batch with which the folder's run began, if it was left to lowmem; 0 for a new run or another choice.

    Raises:
        ConfigError: the folder's run has other settings.
        CheckpointError: what it says of them is damaged.
    """
    saved = _saved_settings(folder)
    if not saved:
        return 0
    wanted = json.loads(json.dumps(asdict(config)))
    changed = [
        f"{key} was {saved.get(key)!r}, now {value!r}" for key, value in wanted.items() if key not in _FREE and saved.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Keep them, choose another out, or start over with --fresh"
        )
    return saved["micro_batch_size"] if config.micro_batch_size == "auto" else 0


def _saved_settings(folder: Path) -> dict[str, Any]:
    """What the folder's finetune.json holds; empty if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "finetune.json"
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or start over with --fresh") from error
    size = saved.get("micro_batch_size") if isinstance(saved, dict) else None
    if not isinstance(size, int) or size < 1 or not isinstance(saved.get("content", {}), dict):
        raise CheckpointError(f"{path} is damaged (no settings of a run); restore it, or start over with --fresh")
    return saved


def check_content(folder: Path, content: dict[str, str]) -> None:
    """Refuse to go on with another base, tokenizer, template or other records than the checkpoints in a folder were trained on.

    Args:
        content: hashes, by what they are of.
    Raises:
        ConfigError: names what has changed.
    """
    saved = _saved_settings(folder).get("content", {})
    changed = [name for name in ("base", "tokenizer", "template", "data") if name in saved and saved[name] != content[name]]
    changed = [name for name in changed if name != "data"] or changed  # tokens differ wherever the template or the tokenizer does
    if changed and CheckpointStore(folder, 1).steps():
        pairs = "; ".join(f"{name} was {str(saved[name])[:12]}, now {content[name][:12]}" for name in changed)
        raise ConfigError(
            f"{folder} holds a run of other content (SHA-256): {pairs}. Restore the files it was trained on, choose another out, "
            "or start over with --fresh"
        )


def base_sha256(directory: Path) -> str:
    """Of the configuration and the weights of a base."""
    files = [directory / "config.json", *weight_files(directory)]
    return json_sha256([[file.name, file_sha256(file)] for file in files])


def check_base(config: FinetuneConfig, directory: Path) -> list[str]:
    """Refuse a base that does not fit its tokenizer or the run, before anything large is read.

    Returns:
        What a person should know.
    Raises:
        ConfigError: the base has fewer positions than a row has tokens.
        CheckpointError: its configuration is damaged or of no family that is trained here; or its tokenizer is larger than its embedding.
        DataError: its tokenizer is missing or malformed.
    """
    model = empty_model(directory, torch.float32)
    needed = config.seq_len + (config.adapter.num_virtual_tokens if config.method == "prefix" else 0)
    positions, said = learned_positions(model), config_positions(model.config)
    if 0 < positions < needed:
        prefix = f" and adapter.num_virtual_tokens {config.adapter.num_virtual_tokens}" if needed > config.seq_len else ""
        raise ConfigError(
            f"seq_len is {config.seq_len}{prefix}, the base {config.base} has {positions} positions; "
            f"use seq_len={max(0, positions - needed + config.seq_len)} or less"
        )
    tokens, rows = read_tokenizer(config, directory).vocab_size, model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise CheckpointError(f"the tokenizer of {directory} has {tokens} tokens, its model {rows}; give files that belong together")
    read_generation_config(directory)
    notes = []
    if not positions and said < needed:
        notes.append(f"seq_len is {config.seq_len}: the base was made for {said} positions, and may compute nonsense beyond them")
    window = attention_window(model.config)
    if 0 < window < config.seq_len:
        notes.append(f"the base looks back at {window} tokens, fewer than seq_len ({config.seq_len}): conversations get rows of their own")
    return notes


def within_container(config: FinetuneConfig) -> tuple[FinetuneConfig, str]:
    """The configuration with a budget that the container's limit allows, and one line if that is not the one asked for."""
    ram, said = granted_memory(parse_bytes(config.budget.ram or "0"))
    return (replace(config, budget=replace(config.budget, ram=f"{ram}B")) if said and config.budget.ram else config), said


def choose_micro_batch(config: FinetuneConfig, directory: Path, at_most: int = 0) -> tuple[FinetuneConfig, FinetuneMemory]:
    """The configuration with its micro-batch settled, and what that needs: of those to choose from the largest that fits the budget.

    Args:
        at_most: the size of the run that is gone on with; 0 is none.
    """
    sizes = [size for size in micro_batch_sizes(config) if not 0 < at_most < size] or [at_most]
    for size in sizes:
        settled = replace(config, micro_batch_size=size)
        memory = predict_memory(settled, directory)
        if not memory.missing(config):
            break
    return settled, memory


def enforce_budget(config: FinetuneConfig, memory: FinetuneMemory) -> None:
    """Refuse a run that is predicted to exceed its budget, and limit the process to the budget.

    Raises:
        MemoryBudgetError: it is; with what would take less.
        ConfigError: there is no such limit here.
    """
    missing = memory.missing(config)
    if missing:
        smaller = ["micro_batch_size=auto"] if config.update == "accumulate" and micro_batch_sizes(config) != [1] else []
        remedies = [*memory_remedies(config), *smaller, "a smaller seq_len"]
        raise MemoryBudgetError(f"this needs about {missing}; use {', '.join(remedies)} or a larger budget")
    try:
        ram, _ = granted_memory(parse_bytes(config.budget.ram or "0"))
        if ram:
            limit_host_memory(ram)
        if config.budget.vram and memory.vram:
            limit_cuda_memory(parse_bytes(config.budget.vram), compute_device())
    except ValueError as error:
        raise ConfigError(str(error)) from error
