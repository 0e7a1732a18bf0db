"""Before training: is the loss that is trained on the model's own, and do the conversations of a row see nothing of each other?

Shapes: B rows, T time.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lowmem.data.batch import IGNORE_INDEX
from lowmem.data.chat import pack_conversations
from lowmem.finetune.step import batch_loss
from lowmem.system.errors import CheckpointError

# Both sides compute the same sums in another order: some hundred roundings of 2**-24 each, which do not add up beyond 1e-5. In 16 bits
# every activation is rounded to 2**-9, and layers add theirs; in 4-bit layers kernels for few and for many rows sum in blocks of their own.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
_TOLERANCE_NF4 = 1e-3
_TOLERANCE_UNSEEN = 1e-6


@torch.no_grad()
def check_loss(model: Any, device: torch.device, *, packed: bool) -> None:
    """Compare the loss of training, on a handful of tokens, with that of the model's own logits, conversation by conversation.

    Args:
        model: from `load_base`; left in evaluation mode.
        packed: whether the conversations of a row are to be kept apart by a mask.
    Raises:
        CheckpointError: they differ, or are not finite: the family does something that the loss of training leaves out.
    Memory: logits of ten tokens: no more than training takes, with the largest vocabularies, too.
    """
    model.eval()
    vocab = model.get_input_embeddings().weight.shape[0]
    first, second, other = (_conversation(length, start, vocab) for length, start in ((6, 3), (5, 41), (6, 90)))
    expected = _own_loss(model, first, device) + _own_loss(model, second, device)
    rows = [[first, second]] if packed else [[first], [second]]
    found = sum(_row_loss(model, row, device) for row in rows)
    # what a token cannot see counts exactly zero, in every precision
    seen = [_row_loss(model, [before, second], device, only=2) for before in (first, other)] if packed else [0.0, 0.0]
    dtype = model.get_input_embeddings().weight.dtype
    allowed = _TOLERANCES[dtype] if not getattr(model, "is_loaded_in_4bit", False) else max(_TOLERANCES[dtype], _TOLERANCE_NF4)
    for loss in (expected, found, *seen):  # the tokens that are not to be seen stand in the last ones alone
        if not np.isfinite(loss):
            raise CheckpointError(
                f"{model.name_or_path} computes a loss of {loss}: its weights are not finite, or too large; restore its files"
            )
    if not abs(found - expected) <= allowed * abs(expected) or not abs(seen[0] - seen[1]) <= _TOLERANCE_UNSEEN * abs(expected):
        raise CheckpointError(
            f"{model.name_or_path}: the loss of packed conversations ({found:.6g}) is not that of the model's own logits ({expected:.6g}); "
            f"models of type {model.config.model_type} with this configuration cannot be trained here"
        )


def _conversation(length: int, start: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and those that count: all but the first two."""
    return (np.arange(start, start + 7 * length, 7) % vocab).astype(np.int64), np.arange(length) >= 2


def _row_loss(model: Any, items: list[tuple[np.ndarray, np.ndarray]], device: torch.device, only: int = 0) -> float:
    """Of all conversations of a row, or of one of them, counted from 1."""
    batch = pack_conversations(items, sum(len(tokens) - 1 for tokens, _ in items)).batch
    assert batch.segments is not None
    assert batch.segments.max() == len(items)
    if only:
        batch.targets[batch.segments != only] = IGNORE_INDEX
    return batch_loss(model, batch, 1.0, device).item()


def _own_loss(model: Any, item: tuple[np.ndarray, np.ndarray], device: torch.device) -> float:
    tokens, counts = torch.from_numpy(item[0]).to(device), torch.from_numpy(item[1]).to(device)
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].float()
    return F.cross_entropy(logits, tokens[1:].masked_fill(~counts[1:], IGNORE_INDEX), ignore_index=IGNORE_INDEX, reduction="sum").item()
