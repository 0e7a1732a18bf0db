"""One text while it is written: choosing its tokens, turning them into characters, and knowing when to stop."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowmem.data.stream_decoder import TokenStreamDecoder
from lowmem.data.tokenizers import Tokenizer
from lowmem.errors import CheckpointError
from lowmem.generation.stop import StopFilter
from lowmem.sampling import SamplingOptions, sample_token

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
        prompt_ids: an empty prompt begins a document with the end-of-document token.
        options: with a seed.
        max_new_tokens: at least 1.
        stop: strings that end the text.
        on_text: called with each piece of text that is certain; characters of several bytes are never split.
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
    ):
        assert options.seed is not None
        self.prompt_ids = list(prompt_ids) or [tokenizer.eos_id]
        self.new_ids: list[int] = []
        self.stop_reason: StopReason | None = None
        self.seed = options.seed
        self._tokenizer, self._options, self._max_new_tokens, self._on_text = tokenizer, options, max_new_tokens, on_text
        self._generator = torch.Generator().manual_seed(options.seed)
        self._seen, self._counts = set(self.prompt_ids), Counter[int]()
        self._decoder, self._stops, self._text = TokenStreamDecoder(tokenizer), StopFilter(stop), list[str]()
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
        if token == self._tokenizer.eos_id:
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
