"""Choosing the next token from logits: pure functions, always computed in fp32 on the CPU so that a seed means the same anywhere.

The order is fixed: repetition penalty, presence and frequency penalties, temperature, top_k, top_p, min_p. top_p counts the
probability that top_k left, renormalised; min_p compares with the most likely token, so its place in the order does not matter.
Among equally likely tokens the lower id comes first.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from lowmem.system.errors import ConfigError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn; the defaults of the filters keep every token.

    Attributes:
        temperature: logits are divided by it; 0 always takes the most likely token.
        top_k: keep only the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probability reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the text, the prompt's too; 1 does nothing.
        presence_penalty: subtracted from the logits of tokens that were written, not of the prompt's; -2 to 2, 0 does nothing.
        frequency_penalty: subtracted once for each time a token was written; -2 to 2, 0 does nothing.
        seed: of the random draws; None takes a fresh one.
    Raises:
        ConfigError: values that cannot be; the message lists all of them, one a line.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}; allowed: {allowed}"
            for name, value, sound, allowed in (
                ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (most likely token) or more"),
                ("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "0 (off) or a number of tokens"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
                ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1"),
                ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
                ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "-2 to 2; 0 is off"),
                ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "-2 to 2; 0 is off"),
                ("seed", self.seed, self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED), "0 to 2**63 - 1"),
            )
            if not sound
        ]
        if problems:
            raise ConfigError("\n".join(problems))


PRESETS: dict[str, dict[str, float]] = {
    "deterministic": {"temperature": 0.0},
    "balanced": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    "creative": {"temperature": 1.1, "min_p": 0.05, "presence_penalty": 0.3, "frequency_penalty": 0.3},
}
"""Values of `SamplingOptions` under a name; what a preset does not mention stays at its default."""


def row_seed(seed: int, index: int) -> int:
    """Seed of text number `index` of a batch: `seed` itself for the first, a hash of both for the others.

    It depends on nothing else of the batch, and gives the same text again when it is written alone.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest(), "little")


def penalize_repetition(logits_V: torch.Tensor, seen_ids: Iterable[int], penalty: float) -> torch.Tensor:
    """Logits in which every token of `seen_ids` is less likely (penalty > 1) or more (penalty < 1); a new tensor.

    Args:
        logits_V: (vocab,) floating point.
        seen_ids: tokens of the text so far; how often each occurs does not matter.
        penalty: above 0; 1 returns `logits_V` itself.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; dividing alone would raise negative logits, so those are multiplied.
    """
    if penalty == 1:
        return logits_V
    index = torch.tensor(sorted(set(seen_ids)), dtype=torch.long)
    seen_logits = logits_V[index]
    return logits_V.index_copy(0, index, torch.where(seen_logits > 0, seen_logits / penalty, seen_logits * penalty))


def penalize_counts(logits_V: torch.Tensor, counts: Mapping[int, int], presence: float, frequency: float) -> torch.Tensor:
    """Logits less presence + frequency * count for every token with a count above 0; a new tensor.

    Args:
        logits_V: (vocab,) floating point.
        counts: how often each token was written so far.
        presence, frequency: both 0 returns `logits_V` itself.
    Source: OpenAI's API reference, "Frequency and presence penalties": mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence.
    """
    written = [(token, presence + frequency * count) for token, count in sorted(counts.items()) if count > 0]
    if not written or (presence == 0 and frequency == 0):
        return logits_V
    index, penalty = zip(*written, strict=True)
    return logits_V.index_add(0, torch.tensor(index), -torch.tensor(penalty, dtype=logits_V.dtype))


def token_probabilities(logits_V: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Probabilities of the next token after temperature and filters; exactly 0 for dropped tokens.

    Args:
        logits_V: (vocab,) finite or -inf; at least one is finite.
    Returns:
        (vocab,) fp32, summing to 1; all on the most likely token at temperature 0.
    Memory: a few tensors of the vocabulary's size.
    Source: top_k Fan et al. 2018, arXiv:1805.04833; top_p Holtzman et al. 2020, arXiv:1904.09751;
        min_p Nguyen et al. 2024, arXiv:2407.01082.
    """
    logits_V = logits_V.float()
    if options.temperature == 0:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    # The maximum is subtracted before dividing: a tiny temperature would otherwise overflow to inf - inf.
    scaled_V = (logits_V - logits_V.max()) / max(options.temperature, torch.finfo(torch.float32).tiny)
    sorted_V, order_V = torch.sort(scaled_V, descending=True, stable=True)
    if options.top_k:
        sorted_V[options.top_k :] = -math.inf
    probabilities_V = torch.softmax(sorted_V, dim=0)
    if options.top_p < 1:
        # A token stays while the ones before it have not reached top_p yet; the first always stays.
        before_V = probabilities_V.cumsum(0) - probabilities_V
        probabilities_V[before_V >= options.top_p] = 0
    if options.min_p > 0:
        probabilities_V[probabilities_V < options.min_p * probabilities_V[0]] = 0
    probabilities_V /= probabilities_V.sum()
    return torch.zeros_like(probabilities_V).index_copy_(0, order_V, probabilities_V)


def sample_token(
    logits_V: torch.Tensor,
    options: SamplingOptions,
    seen_ids: Iterable[int],
    generator: torch.Generator,
    counts: Mapping[int, int] | None = None,
) -> int:
    """The next token.

    Args:
        logits_V: (vocab,) on any device, any floating dtype.
        seen_ids: tokens of the text so far, for the repetition penalty.
        generator: a CPU generator; not advanced at temperature 0.
        counts: of the tokens written so far, for the presence and frequency penalties; None is none.
    Raises:
        ValueError: no logit is finite, or one is NaN or +inf.
    """
    logits_V = logits_V.detach().to("cpu", torch.float32)
    if not torch.isfinite(logits_V.max()):
        raise ValueError("the model's logits are not finite")
    logits_V = penalize_repetition(logits_V, seen_ids, options.repetition_penalty)
    logits_V = penalize_counts(logits_V, counts or {}, options.presence_penalty, options.frequency_penalty)
    probabilities_V = token_probabilities(logits_V, options)
    if options.temperature == 0:
        return int(probabilities_V.argmax())
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
