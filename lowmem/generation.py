"""Writing text with a model: prompt in, tokens out one by one through the model's cache."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from lowmem.data.stream_decoder import TokenStreamDecoder
from lowmem.data.tokenizers import Tokenizer
from lowmem.errors import CheckpointError, ConfigError
from lowmem.models.base import LanguageModel
from lowmem.sampling import SamplingOptions, sample_token

PREFILL_TOKENS = 256


@dataclass(frozen=True)
class GenerationResult:
    """A continuation and how it came about.

    Attributes:
        text: what follows the prompt.
        token_ids: its tokens, without the end-of-document token.
        prompt_tokens: tokens of the prompt.
        stop_reason: eos (the model ended the document) or length (`max_new_tokens` reached).
        seed: gives the same text again.
        window_slides: how often the oldest tokens were dropped because the model's positions ended.
        seconds: from the prompt to the last token.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    stop_reason: Literal["eos", "length"]
    seed: int
    window_slides: int
    seconds: float


class Context:
    """The tokens a model looks at, and the cache that saves computing them again.

    Where positions end after `window` tokens, the last half of the window is computed anew and the rest forgotten, so that
    each slide costs half a window and the next window / 2 tokens cost one each.

    Args:
        model: in evaluation mode.
        capacity: tokens the cache must hold if nothing is ever dropped.
        window: most tokens the model can look at; None is no limit.
    Memory: the model's cache for min(capacity, window) tokens, and the logits of `PREFILL_TOKENS` tokens.
    """

    def __init__(self, model: LanguageModel, capacity: int, window: int | None):
        self.slides = 0
        self._model = model
        self._device = next(model.parameters()).device
        self._window = window
        self._capacity = min(capacity, window) if window else capacity
        self._ids: list[int] = []
        self._cached = 0
        self._cache = None

    def extend(self, ids: list[int]) -> torch.Tensor:
        """Add tokens (at least one); returns the (vocab,) logits of what comes next."""
        self._ids += ids
        if self._window and len(self._ids) > self._window:
            self._ids = self._ids[-max(1, self._window // 2) :]
            self._cache, self._cached = None, 0
            self.slides += 1
        if self._cache is None:
            self._cache = self._model.new_cache(1, self._capacity)
        # In pieces, because the model returns the logits of every token it is given.
        while self._cached < len(self._ids):
            piece = self._ids[self._cached : self._cached + PREFILL_TOKENS]
            logits_BTV = self._model(torch.tensor([piece], device=self._device), cache=self._cache)
            self._cached += len(piece)
        return logits_BTV[0, -1]


def position_window(model: LanguageModel) -> int | None:
    """Most tokens `model` can look at: the length of its learned position table; None where rotary positions or ALiBi go on."""
    config = getattr(model, "config", None)
    learned = config is not None and (config.positions == "learned" or config.name == "i3")
    return model.max_seq_len if learned else None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    options: SamplingOptions,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
    *,
    window: int | None = None,
) -> GenerationResult:
    """Continue `prompt` until the model ends the document or `max_new_tokens` are written.

    Args:
        prompt: an empty one starts a new document.
        max_new_tokens: at least 1.
        on_text: called with each piece of text as it is written; characters of several bytes are never split.
        window: most tokens the model looks at, past which the oldest are dropped; None takes `position_window(model)`.
    Raises:
        ConfigError: `max_new_tokens` is below 1.
        CheckpointError: the model's output is not finite.
    Memory: the model's cache for prompt and continuation.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    prompt_tokens, seen = len(ids), set(ids)
    new_ids: list[int] = []
    text: list[str] = []
    decoder = TokenStreamDecoder(tokenizer)
    stop_reason: Literal["eos", "length"] = "length"

    def write(piece: str) -> None:
        if piece:
            text.append(piece)
            if on_text is not None:
                on_text(piece)

    started, training = time.perf_counter(), model.training
    model.eval()
    try:
        with torch.inference_mode():
            context = Context(model, prompt_tokens + max_new_tokens, window or position_window(model))
            for _ in range(max_new_tokens):
                # A model may have more rows than the tokenizer has tokens; those mean nothing.
                token = _next_token(context.extend(ids)[: tokenizer.vocab_size], options, seen, generator, len(new_ids))
                if token == tokenizer.eos_id:
                    stop_reason = "eos"
                    break
                ids = [token]
                new_ids.append(token)
                seen.add(token)
                write(decoder.push(token))
            write(decoder.finish())
    finally:
        model.train(training)
    seconds = time.perf_counter() - started
    return GenerationResult("".join(text), new_ids, prompt_tokens, stop_reason, seed, context.slides, seconds)


def _next_token(logits_V: torch.Tensor, options: SamplingOptions, seen: set[int], generator: torch.Generator, written: int) -> int:
    try:
        return sample_token(logits_V, options, seen, generator)
    except ValueError as error:
        raise CheckpointError(
            f"{error} after {written} new tokens: the weights are damaged or of a diverged run; choose an older one with --checkpoint=STEP"
        ) from error
