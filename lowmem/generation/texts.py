"""Texts from a model: prompts in, tokens out through the model's cache, several texts at once."""

import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lowmem.data.tokenizers import Tokenizer, TokenStreamDecoder
from lowmem.generation.context import BatchContext, position_window
from lowmem.generation.sampling import SamplingOptions, row_seed, sample_token
from lowmem.models.base import LanguageModel
from lowmem.system.errors import CheckpointError, ConfigError


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may turn out to be the beginning of one.

    The stop string whose last character comes first counts, of several that end there the longest; so where text is cut into pieces does
    not matter.

    Args:
        stop: strings, none empty.
    Attributes:
        found: the stop string that ended the text; None so far.
    Raises:
        ConfigError: an empty string, which would be found everywhere.
    """

    def __init__(self, stop: Sequence[str]):
        if "" in stop:
            raise ConfigError('a stop string is ""; give at least one character, or leave --stop out')
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """What can be shown of the text so far and was not shown yet; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The rest: no stop string came of it."""
        rest, self._held = self._held, ""
        return rest


StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class GenerationResult:
    """A continuation and how it came about.

    Attributes:
        text: what follows the prompt, up to a stop string.
        token_ids: its tokens, without the end-of-document token; with those of the stop string that ended it.
        prompt_tokens: tokens of the prompt.
        stop_reason: eos (the model ended the document), stop (it wrote a stop string) or length (`max_new_tokens` reached).
        seed: gives the same text again, alone or as the first of a batch.
        window_slides: how often the oldest tokens were dropped because the window ended.
        seconds: from the prompt to the last token.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    stop_reason: StopReason
    seed: int
    window_slides: int
    seconds: float


class Row:
    """A text in progress. It has its own random numbers, so that no other text of the batch changes it.

    Args:
        prompt_ids: an empty prompt begins a document, as `Tokenizer.encode_prompt` says.
        options: with a seed.
        max_new_tokens: at least 1.
        stop: strings that end the text.
        on_text: called with each piece of text that is certain; characters of several bytes are never split.
        end_ids: tokens that end the text, beside the end-of-document token.
    Attributes:
        new_ids: tokens written.
        stop_reason: None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        end_ids: Collection[int] = (),
    ):
        assert options.seed is not None
        self.prompt_ids = list(prompt_ids) or tokenizer.encode_prompt("")
        self.new_ids: list[int] = []
        self.stop_reason: StopReason | None = None
        self.seed = options.seed
        self._tokenizer, self._options, self._max_new_tokens, self._on_text = tokenizer, options, max_new_tokens, on_text
        self._generator = torch.Generator().manual_seed(options.seed)
        self._seen, self._counts = set(self.prompt_ids), Counter[int]()
        self._decoder, self._stops, self._text = TokenStreamDecoder(tokenizer), StopFilter(stop), list[str]()
        self._end_ids = {tokenizer.eos_id, *end_ids}
        self._started, self._seconds = 0.0, 0.0

    def start(self) -> None:
        """Its prompt is computed from now on."""
        self._started = time.perf_counter()

    def take(self, logits_V: torch.Tensor) -> None:
        """Choose the next token.

        Args:
            logits_V: (vocab,); a model may have more rows than the tokenizer has tokens, and those mean nothing.
        Raises:
            CheckpointError: the logits are not finite.
        """
        token = self._choose(logits_V[: self._tokenizer.vocab_size])
        if token in self._end_ids:
            self._finish("eos")
            return
        self.new_ids.append(token)
        self._seen.add(token)
        self._counts[token] += 1
        self._write(self._stops.push(self._decoder.push(token)))
        if self._stops.found is not None:
            self._finish("stop")
        elif len(self.new_ids) == self._max_new_tokens:
            self._finish("length")

    def result(self, window_slides: int) -> GenerationResult:
        """Once `stop_reason` is there."""
        assert self.stop_reason is not None
        return GenerationResult(
            "".join(self._text), self.new_ids, len(self.prompt_ids), self.stop_reason, self.seed, window_slides, self._seconds
        )

    def _choose(self, logits_V: torch.Tensor) -> int:
        try:
            return sample_token(logits_V, self._options, self._seen, self._generator, self._counts)
        except ValueError as error:
            raise CheckpointError(
                f"{error} after {len(self.new_ids)} new tokens: the weights are damaged or of a diverged run; "
                "choose an older one with --checkpoint=STEP"
            ) from error

    def _finish(self, reason: StopReason) -> None:
        self._write(self._stops.push(self._decoder.finish()))
        if self._stops.found is not None:  # perhaps only now: a character was incomplete
            reason = "stop"
        self._write(self._stops.finish())
        self.stop_reason = reason
        self._seconds = time.perf_counter() - self._started

    def _write(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            if self._on_text is not None:
                self._on_text(piece)


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
    end_ids: Collection[int] = (),
    window: int | None = None,
) -> GenerationResult:
    """Continue `prompt` until the model ends the document, writes a stop string, or has written `max_new_tokens`.

    Args:
        prompt: text, before which the tokenizer's `begin_ids` are put, or token ids; an empty one starts a new document.
        max_new_tokens: at least 1.
        on_text: called with each piece of text that is certain; characters of several bytes are never split.
        stop: strings that end the text; neither they nor their beginnings are part of it.
        end_ids: tokens that end it, beside the end-of-document token.
        window: most tokens the model looks at, past which the oldest are dropped; None takes `position_window(model)`.
    Raises:
        ConfigError: `max_new_tokens` is below 1, or a stop string is empty.
        CheckpointError: the model's output is not finite.
    Memory: the model's cache for prompt and continuation.
    """
    return generate_batch(model, tokenizer, [prompt], options, max_new_tokens, on_text=on_text, stop=stop, end_ids=end_ids, window=window)[
        0
    ]


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
    end_ids: Collection[int] = (),
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
        Row(tokenizer, ids, replace(options, seed=row_seed(seed, index)), max_new_tokens, stop, on_text, end_ids)
        for index, ids in enumerate(tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
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
