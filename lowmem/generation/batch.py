"""Texts from a model: prompts in, tokens out through the model's cache, several texts at once."""

import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from lowmem.data.tokenizers import Tokenizer
from lowmem.errors import ConfigError
from lowmem.generation.context import BatchContext, position_window
from lowmem.generation.row import GenerationResult, Row
from lowmem.models.base import LanguageModel
from lowmem.sampling import SamplingOptions, row_seed

BATCH_SIZE = 8


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    options: SamplingOptions,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
    *,
    stop: Sequence[str] = (),
    window: int | None = None,
) -> GenerationResult:
    """Continue `prompt` until the model ends the document, writes a stop string, or has written `max_new_tokens`.

    Args:
        prompt: text or token ids; an empty one starts a new document.
        max_new_tokens: at least 1.
        on_text: called with each piece of text that is certain; characters of several bytes are never split.
        stop: strings that end the text; neither they nor their beginnings are part of it.
        window: most tokens the model looks at, past which the oldest are dropped; None takes `position_window(model)`.
    Raises:
        ConfigError: `max_new_tokens` is below 1, or a stop string is empty.
        CheckpointError: the model's output is not finite.
    Memory: the model's cache for prompt and continuation.
    """
    return generate_batch(model, tokenizer, [prompt], options, max_new_tokens, on_text=on_text, stop=stop, window=window)[0]


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    options: SamplingOptions,
    max_new_tokens: int,
    *,
    batch_size: int = BATCH_SIZE,
    on_result: Callable[[int, GenerationResult], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    stop: Sequence[str] = (),
    window: int | None = None,
) -> list[GenerationResult]:
    """Continue several prompts at once. A finished text makes room for the next prompt.

    Text number i has the random numbers of `row_seed(seed, i)`, so neither the other prompts nor `batch_size` change it, except that a
    product of matrices may round differently with another number of rows.

    Args:
        prompts: texts or token ids.
        batch_size: most texts at once, at least 1.
        on_result: called with the number of a prompt and its text, as texts are finished.
        on_text: as in `generate`, for a single prompt.
    Returns:
        One result a prompt, in their order.
    Raises:
        ConfigError: `max_new_tokens` or `batch_size` is below 1, a stop string is empty, or `on_text` is to tell several texts.
        CheckpointError: the model's output is not finite.
    Memory: the model's cache for min(batch_size, prompts) texts as long as the longest prompt and its continuation.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; allowed: 1 or more")
    if on_text is not None and len(prompts) > 1:
        raise ConfigError(f"on_text with {len(prompts)} prompts; it is for one, use on_result")
    if not prompts:
        return []
    seed = secrets.randbits(32) if options.seed is None else options.seed
    rows = [
        Row(tokenizer, ids, replace(options, seed=row_seed(seed, index)), max_new_tokens, stop, on_text)
        for index, ids in enumerate(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    ]
    longest = max(len(row.prompt_ids) for row in rows)
    results: dict[int, GenerationResult] = {}

    def deliver(index: int, result: GenerationResult) -> None:
        results[index] = result
        if on_result is not None:
            on_result(index, result)

    with writing(model):
        batch_size = min(batch_size, len(rows))
        context = BatchContext(model, batch_size, longest + max_new_tokens, window or position_window(model))
        _write(context, rows, batch_size, deliver)
    return [results[index] for index in range(len(rows))]


@contextmanager
def writing(model: LanguageModel) -> Iterator[None]:
    """The model in evaluation mode and without gradients, afterwards as it was."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _write(context: BatchContext, rows: Sequence[Row], batch_size: int, deliver: Callable[[int, GenerationResult], None]) -> None:
    waiting = deque(enumerate(rows))
    active: list[tuple[int, Row]] = []
    while waiting or active:
        while waiting and len(active) < batch_size:
            index, row = waiting.popleft()
            row.start()
            row.take(context.add(row.prompt_ids))
            active.append((index, row))
        unfinished = [place for place, (_, row) in enumerate(active) if row.stop_reason is None]
        if len(unfinished) < len(active):
            for place, (index, row) in enumerate(active):
                if row.stop_reason is not None:
                    deliver(index, row.result(context.slides[place]))
            context.keep(unfinished)
            active = [active[place] for place in unfinished]
            continue
        for (_, row), logits_V in zip(active, context.step([row.new_ids[-1] for _, row in active]), strict=True):
            row.take(logits_V)
