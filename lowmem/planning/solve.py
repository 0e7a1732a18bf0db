"""The largest value of one setting that fits a budget."""

import copy
import math
from dataclasses import dataclass
from itertools import dropwhile

import torch

from lowmem.config import RunConfig
from lowmem.config_check import config_problems
from lowmem.engine.build import build_configured_model
from lowmem.errors import ConfigError
from lowmem.nn.mlp import default_hidden_dim
from lowmem.planning.levers import MARGIN, get_key, missing_bytes, set_key, sizes
from lowmem.planning.predict import Prediction, predict_peak, resolve_without_data

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
    if not (config.budget.ram or config.budget.vram):
        raise ConfigError("--solve needs a budget; give --budget.ram, --budget.vram or both")
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
    if key == "model.lorpt.rank":
        values = [value for value in values if _saves(config, value)]
    return values


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
        with torch.device("meta"):
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
