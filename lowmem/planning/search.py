"""The fastest settings that fit a budget: levers in the order of what they cost the user (D10)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowmem.config import STATE_WIDTHS, RunConfig
from lowmem.config_check import config_problems
from lowmem.errors import ConfigError
from lowmem.planning.estimate import Estimate, Estimator, with_settings
from lowmem.planning.levers import MARGIN, missing_bytes, sizes
from lowmem.planning.predict import Prediction, predict_peak, resolve_without_data
from lowmem.units import parse_bytes

MAX_MICRO_BATCH_TOKENS = 8192  # beyond that a step gets no faster
WORTH = 1.1  # how much faster a plan must be to be preferred to one that changes less of what is learned

Settings = tuple[tuple[str, object], ...]

# What is kept and what is computed again: it costs time only.
_UPDATES: tuple[Settings, ...] = (
    (("train.update", "accumulate"), ("train.activation_checkpointing", "none")),
    (("train.update", "accumulate"), ("train.activation_checkpointing", "selective")),
    (("train.update", "accumulate"), ("train.activation_checkpointing", "low_rank")),
    (("train.update", "accumulate"), ("train.activation_checkpointing", "block")),
    (("train.update", "layerwise"), ("train.activation_checkpointing", "block")),
)


@dataclass(frozen=True)
class Candidate:
    """A point of the search.

    Attributes:
        level: how much of what is learned it may change: 0 nothing, 1 8-bit states, 2 4-bit states, 3 narrow weights.
    """

    settings: Settings
    level: int
    micro_batch_size: int
    estimate: Estimate


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        prediction: of the chosen settings; of the smallest ones if nothing fits.
        fits: whether it does.
        missing: bytes beyond each budget, if not.
        alternatives: predictions of other plans, the fastest first; if nothing fits, those that come nearest.
    """

    prediction: Prediction
    fits: bool
    missing: dict[str, int]
    alternatives: list[Prediction] = field(default_factory=list)


def plan(config: RunConfig, *, margin: float = MARGIN, alternatives: int = 3) -> Plan:
    """The fastest settings for `config` that fit its budget.

    Micro-batch, recomputation, update mode, bits of states and weights are chosen; what the model is and sees is not.

    Args:
        config: with budget.ram, budget.vram or both; everything the search does not choose is kept.
        margin: share of each budget that stays free.
    Raises:
        ConfigError: the configuration contradicts itself or its budget.
    Memory: see `predict_peak`.
    """
    config = copy.deepcopy(config)
    if config.device == "auto":
        config.device = "cuda" if parse_bytes(config.budget.vram or "0") else "cpu"
    config = resolve_without_data(config)
    problems = config_problems(with_settings(config, (), 1))
    if problems:
        raise ConfigError("\n".join(problems))
    found = sorted(_candidates(config, margin), key=lambda candidate: _excess(config, candidate.estimate, margin))
    fitting = [candidate for candidate in found if not _excess(config, candidate.estimate, margin)]
    ranked = _ranked(fitting)
    chosen: list[Prediction] = []
    for candidate in ranked:
        prediction = _verified(config, candidate, margin)
        if prediction is not None:
            chosen.append(prediction)
        if len(chosen) > alternatives:
            break
    if not found:
        raise ConfigError("no combination of train.update and train.activation_checkpointing is allowed with this configuration")
    if chosen:
        chosen.sort(key=lambda prediction: _cost(config, prediction))
        return Plan(chosen[0], True, {}, chosen[1:])
    nearest = [predict_peak(with_settings(config, c.settings, c.micro_batch_size)) for c in found[: alternatives + 1]]
    nearest.sort(key=lambda prediction: sum(missing_bytes(prediction, margin).values()))
    return Plan(nearest[0], False, missing_bytes(nearest[0], margin), nearest[1:])


def _candidates(config: RunConfig, margin: float) -> Iterator[Candidate]:
    """For each mode and level, the largest micro-batch that fits; one sequence at a time where none does."""
    estimator = Estimator(config)
    largest = max(1, MAX_MICRO_BATCH_TOKENS // config.data.seq_len)
    for level, narrowing in enumerate(_levels(config)):
        for update in _UPDATES:
            settings = update + narrowing
            if ("train.activation_checkpointing", "low_rank") in update and not config.model.lorpt.rank and config.model.name != "i3":
                continue  # without low-rank layers it is selective by another name
            if config_problems(with_settings(config, settings, 1)):
                continue
            for size in sizes(config.train.global_batch_size):
                if size > largest and size > 1:
                    continue
                candidate = Candidate(settings, level, size, estimator.estimate(settings, size))
                if size == 1 or not _excess(config, candidate.estimate, margin):
                    yield candidate
                    break


def _levels(config: RunConfig) -> list[Settings]:
    """From what the configuration asks for to the narrowest; every level includes those before it."""
    bits, narrow = config.optim.state_bits, "bf16" if config.train.precision == "fp8" else config.train.precision
    levels: list[Settings] = [()]
    widths = STATE_WIDTHS[config.optim.name]
    levels += [(("optim.backend", "lowmem"), ("optim.state_bits", width)) for width in widths if width < bits]
    if config.train.weight_dtype == "fp32" and narrow != "fp32":
        levels.append((("optim.backend", "lowmem"), ("optim.state_bits", min(widths)), ("train.weight_dtype", narrow)))
    return levels


def _excess(config: RunConfig, estimate: Estimate, margin: float) -> float:
    """Bytes beyond the budgets."""
    pairs = ((config.budget.ram, estimate.host_bytes), (config.budget.vram, estimate.cuda_bytes))
    return sum(max(0.0, need - parse_bytes(limit) * (1 - margin)) for limit, need in pairs if limit and parse_bytes(limit))


def _ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The fastest first, where a level more must be worth it."""
    return sorted(candidates, key=lambda candidate: candidate.estimate.step_s * WORTH**candidate.level)


def _cost(config: RunConfig, prediction: Prediction) -> float:
    """Seconds of a step, more for each level."""
    chosen = prediction.config
    level = (chosen.optim.state_bits < config.optim.state_bits) + (chosen.optim.state_bits == 4 < config.optim.state_bits)
    return prediction.step_s * WORTH ** (level + (chosen.train.weight_dtype != config.train.weight_dtype))


def _verified(config: RunConfig, candidate: Candidate, margin: float) -> Prediction | None:
    """The full prediction, with a smaller micro-batch if the estimate was too low; None if that does not help."""
    for size in sizes(candidate.micro_batch_size):
        prediction = predict_peak(with_settings(config, candidate.settings, size))
        if not missing_bytes(prediction, margin):
            return prediction
    return None
