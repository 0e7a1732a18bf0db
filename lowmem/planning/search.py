"""Plans: the fastest settings that fit a budget, and the largest model that does."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import dropwhile
from typing import Literal

import torch

from lowmem.config.checks import config_problems
from lowmem.config.schema import STATE_WIDTHS, RunConfig
from lowmem.engine.from_config import build_configured_model
from lowmem.models.base import LanguageModel
from lowmem.nn.layers import default_hidden_dim
from lowmem.nn.lorpt import break_even_rank
from lowmem.nn.lorptize import following_layers
from lowmem.optim.from_config import allocate_states, build_optimizer
from lowmem.planning.disk_space import checkpoints_at_once
from lowmem.planning.levers import MARGIN, changed, get_key, missing_bytes, set_key, sizes, streaming
from lowmem.planning.predict import Prediction, predict_peak, resolve_without_data
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import ConfigError
from lowmem.system.units import parse_bytes

_LAYERS = (2, 3)
_MICRO_BATCHES = (1, 2)


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds."""

    host_bytes: float
    cuda_bytes: float
    step_s: float
    disk_bytes: float = 0.0


Measures = tuple[float, float, float, float]  # as in an Estimate, in its order


class Estimator:
    """Estimates for configurations that differ from `config` in anything; traces are shared where they can be.

    Args:
        config: resolved.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self._short = cache(self._short_trace)
        self._model: LanguageModel | None = None

    def estimate(self, settings: tuple[tuple[str, object], ...], micro_batch_size: int) -> Estimate:
        """What a run with these settings and this micro-batch will need.

        Args:
            settings: dotted keys and values.
        """
        if ("optim.state_bits", 4) in settings and not self._streams(settings):
            wide = tuple((key, 8 if key == "optim.state_bits" else value) for key, value in settings)
            other = self.estimate(wide, micro_batch_size)
            saved = self._state_bytes(8) - self._state_bytes(4)
            other = replace(other, disk_bytes=other.disk_bytes - saved * checkpoints_at_once(self.config))
            if self.config.device == "cuda":
                return replace(other, cuda_bytes=other.cuda_bytes - saved)
            return replace(other, host_bytes=other.host_bytes - saved)
        if micro_batch_size == self.config.train.global_batch_size:  # gradients of a first micro-batch never meet a second one
            return Estimate(*self._all_layers(settings, micro_batch_size, whole=True))
        points = {m: self._all_layers(settings, m) for m in _MICRO_BATCHES if self.config.train.global_batch_size % m == 0}
        return _at(points, micro_batch_size)

    def _streams(self, settings: tuple[tuple[str, object], ...]) -> bool:
        return dict(settings).get("train.weights_at", self.config.train.weights_at) != "device"

    def _all_layers(self, settings: tuple[tuple[str, object], ...], micro_batch_size: int, whole: bool = False) -> Measures:
        """What the whole model needs.

        Args:
            whole: the micro-batch is the global batch.
        """
        layers = self.config.model.num_layers
        if layers <= max(_LAYERS) or self.config.model.name == "i3" or self.config.model.path:
            return self._measures(settings, layers, micro_batch_size, whole)
        low, high = (self._measures(settings, few, micro_batch_size, whole) for few in _LAYERS)
        more = (layers - _LAYERS[0]) / (_LAYERS[1] - _LAYERS[0])
        host, cuda, seconds, disk = (a + (b - a) * more for a, b in zip(low, high, strict=True))
        return host, cuda, seconds, disk

    def _state_bytes(self, bits: Literal[8, 4]) -> int:
        """Of the optimizer of the whole model."""
        with on_meta():
            model = self._model = self._model or build_configured_model(self.config)
            optimizer = build_optimizer(model, replace(self.config.optim, state_bits=bits, backend="lowmem"), partial=True)
            allocate_states(optimizer)
        values = (value for state in optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def _measures(self, settings: tuple[tuple[str, object], ...], layers: int, micro_batch_size: int, whole: bool) -> Measures:
        prediction = self._short(settings, layers, micro_batch_size, whole)
        return prediction.host.peak_bytes, prediction.cuda_reserved.peak_bytes, prediction.step_s, prediction.disk_bytes

    def _short_trace(self, settings: tuple[tuple[str, object], ...], layers: int, micro_batch_size: int, whole: bool) -> Prediction:
        config = with_settings(self.config, settings, micro_batch_size)
        if whole:
            config.train.global_batch_size = micro_batch_size
        config.model.num_layers = layers
        if not config.model.path:
            config.model.lorpt.ranks = {}  # patterns may name layers that are not there
        return predict_peak(config)


def with_settings(config: RunConfig, settings: tuple[tuple[str, object], ...], micro_batch_size: int) -> RunConfig:
    """A copy with the settings in force."""
    config = copy.deepcopy(config)
    for key, value in settings:
        set_key(config, key, value)
    config.train.micro_batch_size = micro_batch_size
    return config


def _at(points: dict[int, Measures], micro_batch_size: int) -> Estimate:
    """Memory is linear in the micro-batch, time in its inverse."""
    host, cuda, seconds, disk = points[1]
    if len(points) == 1 or micro_batch_size == 1:
        return Estimate(host, cuda, seconds, disk)
    host_2, cuda_2, seconds_2, _ = points[2]
    more = micro_batch_size - 1
    overhead = (seconds - seconds_2) * 2  # of all micro-batches of one sequence, whatever is in them
    seconds -= overhead * (1 - 1 / micro_batch_size)
    return Estimate(host + (host_2 - host) * more, cuda + (cuda_2 - cuda) * more, seconds, disk)


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
_BY_BLOCKS: Settings = (("train.update", "layerwise"), ("train.activation_checkpointing", "block"))
# Where blocks are besides the device, for what fits in no other way: it costs time, and wears a disk.
_ELSEWHERE: tuple[Settings, ...] = (
    (*_BY_BLOCKS, ("train.weights_at", "host"), ("train.boundary_offload", "cpu")),
    (*_BY_BLOCKS, ("train.weights_at", "disk"), ("train.boundary_offload", "disk")),
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

    Micro-batch, recomputation, update mode, bits of states and weights are chosen; what the model is and sees is not. Where nothing fits,
    blocks are kept in a GPU's host memory, or on a disk.

    Args:
        config: with budget.ram, budget.vram or both, and perhaps budget.disk; everything the search does not choose is kept.
        margin: share of each budget of memory that stays free.
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
    found, chosen = _search(config, _UPDATES, margin, alternatives)
    if not chosen:
        more, chosen = _search(config, _places(config), margin, alternatives)
        found = sorted([*found, *more], key=lambda candidate: _excess(config, candidate.estimate, margin))
    if not found:
        raise ConfigError("no combination of train.update and train.activation_checkpointing is allowed with this configuration")
    if chosen:
        chosen.sort(key=lambda prediction: _cost(config, prediction))
        return Plan(chosen[0], True, {}, chosen[1:])
    nearest = [predict_peak(with_settings(config, c.settings, c.micro_batch_size)) for c in found[: alternatives + 1]]
    nearest.sort(key=lambda prediction: sum(missing_bytes(prediction, margin).values()))
    return Plan(nearest[0], False, missing_bytes(nearest[0], margin), nearest[1:])


def _search(config: RunConfig, ways: Sequence[Settings], margin: float, alternatives: int) -> tuple[list[Candidate], list[Prediction]]:
    """All candidates, those that come nearest first, and the predictions of the fastest that fit."""
    found = sorted(_candidates(config, ways, margin), key=lambda candidate: _excess(config, candidate.estimate, margin))
    chosen: list[Prediction] = []
    for candidate in _ranked([candidate for candidate in found if not _excess(config, candidate.estimate, margin)]):
        prediction = _verified(config, candidate, margin)
        if prediction is not None:
            chosen.append(prediction)
        if len(chosen) > alternatives:
            break
    return found, chosen


def _places(config: RunConfig) -> list[Settings]:
    """Where else blocks may be; what does not go with the rest of the configuration is refused as any candidate is."""
    allowed = {get_key(changed(config, place), "train.weights_at") for place in streaming(config)}
    return [place for place in _ELSEWHERE if dict(place)["train.weights_at"] in allowed]


def _candidates(config: RunConfig, ways: Sequence[Settings], margin: float) -> Iterator[Candidate]:
    """For each way of computing and level, the largest micro-batch that fits; one sequence at a time where none does."""
    estimator = Estimator(config)
    largest = max(1, MAX_MICRO_BATCH_TOKENS // config.data.seq_len)
    for level, narrowing in enumerate(_levels(config)):
        for update in ways:
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
    budget, room = config.budget, 1 - margin
    pairs = ((budget.ram, estimate.host_bytes, room), (budget.vram, estimate.cuda_bytes, room), (budget.disk, estimate.disk_bytes, 1.0))
    return sum(max(0.0, need - parse_bytes(limit) * share) for limit, need, share in pairs if limit and parse_bytes(limit))


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


_STEPS = {"model.num_layers": 1, "data.seq_len": 64, "model.lorpt.rank": 8}
_LIMITS = {"model.dim": 16384, "model.num_layers": 512, "data.seq_len": 131072, "model.lorpt.rank": 8192}
SOLVABLE = ("model.dim", "model.num_layers", "data.seq_len", "train.micro_batch_size", "model.lorpt.rank")


@dataclass(frozen=True)
class Solution:
    """The largest value that fits and the next one, which does not.

    Attributes:
        value: 0 if not even the smallest fits.
        prediction: for `value`, or for the smallest.
        beyond: the next value; 0 if there is none.
    """

    key: str
    value: int
    prediction: Prediction
    beyond: int


def solve(config: RunConfig, key: str, *, margin: float = MARGIN) -> Solution:
    """The largest value of `key` with which `config`, otherwise as it is, fits its budget.

    Args:
        key: one of `SOLVABLE`. model.dim moves in multiples of 64 that the heads divide, with hidden_dim at its default;
            data.seq_len in multiples of 64; model.lorpt.rank in multiples of 8 that save parameters.
    Raises:
        ConfigError: another key, or no budget.
    """
    if key not in SOLVABLE:
        raise ConfigError(f"--solve is {key!r}; allowed: {', '.join(SOLVABLE)}")
    if not (config.budget.ram or config.budget.vram or config.budget.disk):
        raise ConfigError("--solve needs a budget; give --budget.ram, --budget.vram or --budget.disk")
    config = resolve_without_data(config)
    values = list(dropwhile(lambda value: not _is_valid(config, key, value), _values(config, key)))
    if not values:
        raise ConfigError(f"--solve={key} has no value that this configuration allows")
    fits: dict[int, Prediction | None] = {}

    def check(index: int) -> bool:
        prediction = predict_peak(_with(config, key, values[index]))
        fits[index] = prediction
        return not missing_bytes(prediction, margin)

    if not check(0):
        smallest = fits[0]
        assert smallest is not None
        return Solution(key, 0, smallest, values[0])
    low, high = 0, 1
    while high < len(values) and check(high):  # doubling: large candidates are slow to trace
        low, high = high, high * 2
    high = min(high, len(values))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if check(middle) else (low, middle)
    best = fits[low]
    assert best is not None
    return Solution(key, values[low], best, values[high] if high < len(values) else 0)


def _values(config: RunConfig, key: str) -> list[int]:
    if key == "train.micro_batch_size":
        return sorted(sizes(config.train.global_batch_size))
    if key == "model.dim":
        heads = config.model.num_heads
        step = math.lcm(64, 2 * heads)
        return list(range(step, _LIMITS[key] + 1, step))
    step = _STEPS[key]
    values = list(range(step, _LIMITS[key] + 1, step))
    if key == "model.lorpt.rank" and config.model.path:
        limit = _narrowest(config)
        return [value for value in values if value < limit]
    if key == "model.lorpt.rank":
        values = [value for value in values if _saves(config, value)]
    return values


def _narrowest(config: RunConfig) -> float:
    """The rank from which on some layer of a model of transformers would grow."""
    with on_meta():
        model = build_configured_model(_with(config, "model.lorpt.rank", 1))
        layers = list(following_layers(model, config.model.lorpt.ranks))
    return min((break_even_rank(layer.in_features, layer.out_features) for _, layer in layers), default=0.0)


def _saves(config: RunConfig, rank: int) -> bool:
    """Whether the factors of every layer are smaller than it; the narrowest layer decides."""
    dim = config.model.dim
    default = 4 * dim if config.model.name == "i3" else default_hidden_dim(config.model.activation, dim)
    hidden = config.model.hidden_dim or default
    shapes = [(dim, dim)] if "attention" in config.model.lorpt.targets else []
    shapes += [(dim, hidden)] if "mlp" in config.model.lorpt.targets else []
    shapes += [(dim, config.model.vocab_size)] if "head" in config.model.lorpt.targets else []
    return all(rank * (a + b) < a * b for a, b in shapes)


def _is_valid(config: RunConfig, key: str, value: int) -> bool:
    """Whether a model of that size exists: small ones may be narrower than their ranks."""
    try:
        with on_meta():
            build_configured_model(_with(config, key, value))
    except ConfigError:
        return False
    return True


def _with(config: RunConfig, key: str, value: int) -> RunConfig:
    config = copy.deepcopy(config)
    set_key(config, key, value)
    if key == "model.dim":
        config.model.hidden_dim = 0
    if key == "data.seq_len":
        config.model.max_seq_len = max(config.model.max_seq_len, value)
    problems = config_problems(config)
    if problems:
        raise ConfigError(f"--solve={key} tried {get_key(config, key)}: {'; '.join(problems)}")
    return config
