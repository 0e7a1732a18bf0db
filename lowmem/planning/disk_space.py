"""What a run takes of its disks: the scratch file of blocks and boundaries, the checkpoints that are there at once, token shards."""

import torch

from lowmem.config.schema import RunConfig
from lowmem.data.text import find_files
from lowmem.engine.local import LocalEngine
from lowmem.engine.state import optimizer_tensors
from lowmem.models.base import LanguageModel, saved_tensors
from lowmem.nn.quantized import stored_tensors
from lowmem.system.errors import DataError

EVALUATION_BATCH = 16  # windows at once, as `lowmem.data.stream` yields them
_TEXT_BYTES_PER_TOKEN = {"bytes": 1}  # where it is known before text is read; others' shards are not foretold
_SHARD_ITEMSIZE = 2


def checkpoint_bytes(model: LanguageModel, engine: LocalEngine) -> int:
    """Of the tensors in one checkpoint: weights as they are stored, of what is trained, and its optimizer states."""
    weights, (states, _) = stored_tensors(saved_tensors(model)), optimizer_tensors(model, engine.optimizer)
    away = engine.storage.saved_states(dict(model.named_parameters()))
    here = sum(tensor.numel() * tensor.element_size() for tensor in (*weights.values(), *states.values()))
    return here + sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in away.values())


def checkpoints_at_once(config: RunConfig) -> int:
    """The newest, the best one, those at the ends of earlier phases, and the one being written; no more than a run ever writes."""
    train, steps = config.train, config.total_steps()
    kept = train.keep_last + bool(train.eval_every) + len(config.all_phases()) - 1
    if train.eval_every and train.eval_every < steps:  # the best one is written when it is found
        return kept + 1
    return min(kept + 1, len(config.all_phases()) + (steps // train.save_every if train.save_every else 0))


def disk_components(config: RunConfig, checkpoint: int, scratch: int) -> dict[str, int]:
    """Bytes on disks, by what they are for.

    Args:
        checkpoint: bytes of one.
        scratch: bytes of the scratch files.
    """
    found = {"scratch": scratch, "checkpoints": checkpoint * checkpoints_at_once(config), "shards": _shard_bytes(config)}
    return {name: size for name, size in found.items() if size}


def _shard_bytes(config: RunConfig) -> int:
    """Of plain text on this machine, where its tokens are known without reading it."""
    if config.data.tokenizer not in _TEXT_BYTES_PER_TOKEN:
        return 0
    total = 0
    for source in (source for phase in config.all_phases() if phase.kind == "text" for source in phase.sources or config.data.sources):
        try:
            files = find_files(source.path).files if source.path else []
            total += sum(file.stat().st_size for file in files if file.suffix == ".txt")
        except (DataError, OSError):
            continue  # a plan needs no text
    return total * _SHARD_ITEMSIZE // _TEXT_BYTES_PER_TOKEN[config.data.tokenizer]


def assumed_new_tokens(config: RunConfig) -> range:
    """Ids for data.add_tokens where the tokenizer that gives them is not read: the last rows."""
    return range(max(0, config.model.vocab_size - len(config.data.add_tokens)), config.model.vocab_size if config.data.add_tokens else 0)
