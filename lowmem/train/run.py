"""A run: its parts, and where it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lowmem.config import PhaseConfig, RunConfig
from lowmem.data.prepare import PreparedData
from lowmem.engine.base import Engine
from lowmem.engine.tensor_file import all_finite
from lowmem.memory.phases import PhasePeaks
from lowmem.nn.quantized import stored_tensors
from lowmem.train.checkpoint import CheckpointStore
from lowmem.train.loggers import MetricsLogger
from lowmem.train.progress import ProgressDisplay
from lowmem.train.run_dir import RunDir
from lowmem.train.state import TrainState


@dataclass
class Run:
    """All parts of a run, put together by `lowmem.train.setup`.

    Attributes:
        config: resolved.
        phase_data: what each phase of the run trains on.
        run_dir: rank 0 only, None elsewhere.
        loggers: rank 0 only, empty elsewhere.
        resumed: whether it goes on from a checkpoint.
        phases: the peak memory of set-up, steps, evaluation and saving.
        last_evaluation: step and loss of the last one of this process.
        speeds: tokens a second of every step of this process, by length of its sequences.
    """

    config: RunConfig
    engine: Engine
    phase_data: list[PreparedData]
    state: TrainState
    checkpoints: CheckpointStore
    display: ProgressDisplay
    run_dir: RunDir | None
    loggers: list[MetricsLogger]
    resumed: bool = False
    phases: PhasePeaks = field(default_factory=PhasePeaks)
    last_evaluation: tuple[int, float] | None = None
    speeds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def data(self) -> PreparedData:
        """Of the present phase."""
        return self.phase_data[self.state.phase]

    @property
    def phase(self) -> PhaseConfig:
        """The present phase, with its name and steps."""
        return self.config.all_phases()[self.state.phase]

    @property
    def phase_step(self) -> int:
        """Steps done of the present phase."""
        return self.state.step - self.state.phase_start

    def is_complete(self) -> bool:
        """Whether nothing is left to train."""
        last = self.state.phase == len(self.phase_data) - 1
        return last and (self.state.data_ended or self.phase_step >= self.phase.steps)


def are_finite(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether no element is NaN or infinite; of quantised weights their scales are looked at.

    Memory: two numbers at a time.
    """
    return all(all_finite(tensor) for tensor in stored_tensors(weights).values())
