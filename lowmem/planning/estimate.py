"""Peaks and speed of many similar runs from few short traces.

A run's peak grows linearly with its layers, with its micro-batch, and with the product of the two; the work of a step with its layers and
with the number of micro-batches. Four traces of models of two and three layers tell the coefficients. What a search finds this way is
predicted in full before anyone is told.
"""

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

from lowmem.config import RunConfig
from lowmem.engine.build import build_configured_model
from lowmem.models.base import LanguageModel
from lowmem.optim.build import allocate_states, build_optimizer
from lowmem.planning.levers import set_key
from lowmem.planning.predict import Prediction, predict_peak

_LAYERS = (2, 3)
_MICRO_BATCHES = (1, 2)


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds."""

    host_bytes: float
    cuda_bytes: float
    step_s: float


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
        if ("optim.state_bits", 4) in settings:
            wide = tuple((key, 8 if key == "optim.state_bits" else value) for key, value in settings)
            other = self.estimate(wide, micro_batch_size)
            saved = self._state_bytes(8) - self._state_bytes(4)
            if self.config.device == "cuda":
                return replace(other, cuda_bytes=other.cuda_bytes - saved)
            return replace(other, host_bytes=other.host_bytes - saved)
        if micro_batch_size == self.config.train.global_batch_size:  # gradients of a first micro-batch never meet a second one
            return Estimate(*self._all_layers(settings, micro_batch_size, whole=True))
        points = {m: self._all_layers(settings, m) for m in _MICRO_BATCHES if self.config.train.global_batch_size % m == 0}
        return _at(points, micro_batch_size)

    def _all_layers(
        self, settings: tuple[tuple[str, object], ...], micro_batch_size: int, whole: bool = False
    ) -> tuple[float, float, float]:
        """Host bytes, device bytes and seconds of the whole model.

        Args:
            whole: the micro-batch is the global batch.
        """
        layers = self.config.model.num_layers
        if layers <= max(_LAYERS) or self.config.model.name == "i3":
            return self._measures(settings, layers, micro_batch_size, whole)
        low, high = (self._measures(settings, few, micro_batch_size, whole) for few in _LAYERS)
        more = (layers - _LAYERS[0]) / (_LAYERS[1] - _LAYERS[0])
        host, cuda, seconds = (a + (b - a) * more for a, b in zip(low, high, strict=True))
        return host, cuda, seconds

    def _state_bytes(self, bits: Literal[8, 4]) -> int:
        """Of the optimizer of the whole model."""
        with torch.device("meta"):
            model = self._model = self._model or build_configured_model(self.config)
            optimizer = build_optimizer(model, replace(self.config.optim, state_bits=bits, backend="lowmem"), partial=True)
            allocate_states(optimizer)
        values = (value for state in optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    def _measures(
        self, settings: tuple[tuple[str, object], ...], layers: int, micro_batch_size: int, whole: bool
    ) -> tuple[float, float, float]:
        prediction = self._short(settings, layers, micro_batch_size, whole)
        return prediction.host.peak_bytes, prediction.cuda_reserved.peak_bytes, prediction.step_s

    def _short_trace(self, settings: tuple[tuple[str, object], ...], layers: int, micro_batch_size: int, whole: bool) -> Prediction:
        config = with_settings(self.config, settings, micro_batch_size)
        if whole:
            config.train.global_batch_size = micro_batch_size
        config.model.num_layers = layers
        config.model.lorpt.ranks = {}  # patterns may name layers that are not there
        return predict_peak(config)


def with_settings(config: RunConfig, settings: tuple[tuple[str, object], ...], micro_batch_size: int) -> RunConfig:
    """A copy with the settings in force."""
    config = copy.deepcopy(config)
    for key, value in settings:
        set_key(config, key, value)
    config.train.micro_batch_size = micro_batch_size
    return config


def _at(points: dict[int, tuple[float, float, float]], micro_batch_size: int) -> Estimate:
    """Memory is linear in the micro-batch, time in its inverse."""
    host, cuda, seconds = points[1]
    if len(points) == 1 or micro_batch_size == 1:
        return Estimate(host, cuda, seconds)
    host_2, cuda_2, seconds_2 = points[2]
    more = micro_batch_size - 1
    overhead = (seconds - seconds_2) * 2  # of all micro-batches of one sequence, whatever is in them
    return Estimate(host + (host_2 - host) * more, cuda + (cuda_2 - cuda) * more, seconds - overhead * (1 - 1 / micro_batch_size))
