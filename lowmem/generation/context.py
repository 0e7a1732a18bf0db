"""The tokens a model looks at, text by text, and the cache that saves computing them again."""

from collections.abc import Sequence

import torch

from lowmem.engine.run_model import RunModel
from lowmem.models.base import LanguageModel

PREFILL_TOKENS = 256


class BatchContext:
    """Several texts in one cache: each is read in by itself, then all go on together, one token each.

    Where the window ends, the last half of it is computed anew and the rest forgotten, so that each slide costs half a window and the
    next window / 2 tokens cost one each. Use it under `torch.inference_mode`.

    Args:
        model: in evaluation mode.
        batch_size: most texts at once.
        capacity: tokens that a text has at most if nothing is ever dropped.
        window: most tokens the model looks at; None is no limit.
    Attributes:
        ids: the tokens in view, by text.
        slides: how often the window moved, by text.
    Memory: the model's cache for batch_size texts of min(capacity, window) tokens; logits of `PREFILL_TOKENS` tokens, or of one token of
        every text.
    """

    def __init__(self, model: LanguageModel, batch_size: int, capacity: int, window: int | None):
        self.ids: list[list[int]] = []
        self.slides: list[int] = []
        self._model, self._window = model, window
        self._device = next(model.parameters()).device
        self._cache = model.new_cache(batch_size, min(capacity, window) if window else capacity)

    def add(self, ids: Sequence[int]) -> torch.Tensor:
        """A new text of at least one token; returns the (vocab,) logits of what comes next."""
        self.ids.append([])
        self.slides.append(0)
        return self.extend(len(self.ids) - 1, ids)

    def extend(self, row: int, ids: Sequence[int]) -> torch.Tensor:
        """Continue one text by at least one token; returns the (vocab,) logits of what comes next."""
        held = len(self.ids[row])
        self.ids[row] += ids
        if self._slide(row) or not held:
            self._cache.rows(row, row + 1).reset()
            held = 0
        return self._read(row, self.ids[row][held:])

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Continue every text by one token; returns (texts, vocab) logits on the CPU."""
        for row, token in enumerate(tokens):
            self.ids[row].append(token)
            if self._slide(row):
                self._cache.rows(row, row + 1).reset()
                if self.ids[row][:-1]:
                    self._read(row, self.ids[row][:-1])
        tokens_B1 = torch.tensor(tokens, device=self._device).unsqueeze(1)
        return self._model(tokens_B1, cache=self._cache.rows(0, len(tokens)))[:, -1].cpu()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the texts that are not among `rows`, which are ascending; the others move up in place."""
        self.ids, self.slides = [self.ids[row] for row in rows], [self.slides[row] for row in rows]
        self._cache.keep(rows)

    def _slide(self, row: int) -> bool:
        """Forget the older half if the window is full; whether it was."""
        if not self._window or len(self.ids[row]) <= self._window:
            return False
        self.ids[row] = self.ids[row][-max(1, self._window // 2) :]
        self.slides[row] += 1
        return True

    def _read(self, row: int, ids: list[int]) -> torch.Tensor:
        """Add tokens to the cache of one text. In pieces, because the model returns the logits of every token it is given."""
        cache = self._cache.rows(row, row + 1)
        for start in range(0, len(ids), PREFILL_TOKENS):
            piece = torch.tensor([ids[start : start + PREFILL_TOKENS]], device=self._device)
            logits_V = self._model(piece, cache=cache)[0, -1].clone()  # a view would keep the logits of the whole piece
        return logits_V


def position_window(model: LanguageModel) -> int | None:
    """Most tokens `model` can look at: the length of its learned position table; None where rotary positions or ALiBi go on."""
    limit = getattr(model, "position_limit", 0)
    if limit:
        return int(limit)
    config = getattr(model, "config", None)
    learned = config is not None and (config.positions == "learned" or config.name == "i3")
    return model.max_seq_len if learned else None


_LONGEST_CHAT = 8192  # many models of transformers are made for far more, whose cache alone would fill the memory


def chat_context(model: LanguageModel) -> int:
    """Tokens that a conversation may have before its oldest turns are forgotten."""
    return min(model.max_seq_len, _LONGEST_CHAT)


def beyond_training(run: RunModel, tokens: int) -> str:
    """A warning that a text is longer than what the run's rotary positions were trained on; empty if it is not.

    A run that began with the weights of another model counts as trained on `model.max_seq_len` tokens.

    Args:
        tokens: of prompt and continuation.
    """
    config = run.config
    if config.model.path:
        return ""
    trained = config.data.seq_len if run.step and not config.train.init_from else run.model.max_seq_len
    if run.model.config.name != "decoder" or run.model.config.positions != "rope" or tokens <= trained:  # type: ignore[union-attr]
        return ""
    return (
        f"warning: prompt and max_new_tokens are {tokens} tokens, the rotary positions of this run were trained on {trained}: what is "
        f"written past them gets worse with every token; lower --max_new_tokens, or train with data.seq_len={tokens} or "
        "model.positions=alibi"
    )
