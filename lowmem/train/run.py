"""A run: its parts, where it is, and what it must remember to go on exactly from there."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from lowmem.config.schema import PhaseConfig, RunConfig
from lowmem.data.prepare import PreparedData
from lowmem.engine.base import Engine
from lowmem.memory.measure import PeakRecorder
from lowmem.system.errors import CheckpointError, ConfigError
from lowmem.system.units import format_bytes, format_count
from lowmem.train.display import ProgressDisplay
from lowmem.train.loggers import MetricsLogger
from lowmem.train.run_dir import CheckpointStore, RunDir, reading_state

FORMAT_VERSION = 1
# checkpoints from before these existed lack them
_NEWER = {"rank", "flat_evaluations", "phase", "phase_start", "phase_ends", "data_ended", "tokenizer_sha256", "base_sha256"}
_PAST = ("bad_steps", "skipped_steps", "best_step", "phase_start")  # counts of steps that were done


@dataclass
class TrainState:
    """Progress of a run; everything in it is plain JSON.

    Attributes:
        step: updates done, skipped ones included.
        tokens: tokens seen.
        bad_steps: non-finite steps in a row up to now.
        skipped_steps: all non-finite steps so far.
        best_val_loss, best_step: of the best evaluation so far.
        rank: that the schedule or a plateau has set last; 0 is the configured one.
        flat_evaluations: in a row that were not 0.1 % better than the best before, since the rank last grew.
        phase, phase_start: number of the present phase, and the steps before it.
        phase_ends: steps after which a phase ended and another began; their checkpoints are kept.
        data_ended: the last phase has no data left.
        data: position of the present phase's stream.
        data_fingerprint: what the token shards were built from.
        tokenizer_sha256: of the tokenizer that the weights know; "" in checkpoints of earlier versions.
        base_sha256: of the files of model.path, where they hold weights that are not trained; else "".
        engine: what `Engine.save` returned.
    """

    step: int = 0
    tokens: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    best_val_loss: float | None = None
    best_step: int = 0
    rank: int = 0
    flat_evaluations: int = 0
    phase: int = 0
    phase_start: int = 0
    phase_ends: list[int] = field(default_factory=list)
    data_ended: bool = False
    data: dict[str, Any] = field(default_factory=dict)
    data_fingerprint: str = ""
    tokenizer_sha256: str = ""
    base_sha256: str = ""
    engine: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of state.json."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """The state in a state.json.

        Raises:
            CheckpointError: written by another format version, or fields are missing.
        """
        version = values.get("format_version")
        names = {item.name for item in fields(cls)}
        if version != FORMAT_VERSION or not names - _NEWER <= set(values):
            raise CheckpointError(
                f"state.json has format {version} and fields {sorted(values)}; this lowmem reads format {FORMAT_VERSION}; "
                "resume with the version that wrote it, or start over with --fresh"
            )
        for name, default in asdict(cls()).items():
            value = values.get(name, default)
            count = isinstance(default, int) and not isinstance(default, bool)
            if default is not None and (type(value) is not type(default) or (count and value < 0)):
                raise CheckpointError(f"state.json has {name} {value!r:.60}, expected {'a count' if count else type(default).__name__}")
        past = [(name, values.get(name, 0)) for name in _PAST] + [("phase_ends", end) for end in values.get("phase_ends", [])]
        for name, value in past:
            if type(value) is not int or not 0 <= value <= values["step"]:
                raise CheckpointError(f"state.json has {name} {value!r:.60}, expected 0 to its step {values['step']}")
        return cls(**{name: values[name] for name in names if name in values})


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
    peaks: PeakRecorder = field(default_factory=PeakRecorder)
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

    def resume(self, *, skip_damaged: bool) -> None:
        """Go on from the newest checkpoint, if there is one; every rank calls it.

        Args:
            skip_damaged: pass over damaged checkpoints.
        Raises:
            ConfigError: the checkpoint is of a run with other settings or other text.
            CheckpointError: it is damaged.
        """
        self.engine.barrier()  # rank 0 may have moved an old run aside
        found = self.checkpoints.newest_valid(skip_damaged=skip_damaged)
        if found is not None:
            path, values = found
            state = TrainState.from_json(values)
            if self.run_dir is not None:
                self.run_dir.check_compatible(self.config, resolved=True)
            if state.data_fingerprint != self.state.data_fingerprint:
                raise ConfigError(
                    f"{path} was trained on other text or another tokenizer ({state.data_fingerprint[:12]}, now "
                    f"{self.state.data_fingerprint[:12]}); "
                    "restore the files it was trained on, choose another run_dir, or start over with --fresh"
                )
            if state.base_sha256 != self.state.base_sha256:
                raise ConfigError(
                    f"{path} was trained on other weights of model.path {self.config.model.path} (SHA-256 {state.base_sha256[:12]}, now "
                    f"{self.state.base_sha256[:12]}); restore its files, choose another run_dir, or start over with --fresh"
                )
            with reading_state(path):
                self.engine.load(path, state.engine)
                state.tokenizer_sha256 = self.state.tokenizer_sha256  # the fingerprint has it in it; earlier versions recorded that alone
                self.state, self.resumed = state, True
                self.data.train.load_state_dict(state.data)
        self.engine.barrier()  # everyone has read before rank 0 tidies up
        if self.run_dir is not None:
            for name in self.checkpoints.set_aside_after(self.state.step):
                self.display.message(f"damaged checkpoint kept as {name}")
            self.checkpoints.repair(self.state.step, self.state.best_step)
            self.run_dir.truncate_metrics(self.state.step)
            if found is not None:
                self.display.message(f"resumed from {found[0]}")

    def describe(self) -> str:
        """One line for people: the model, where and how it is trained."""
        config, engine = self.config, self.engine
        count = engine.model.num_trained_parameters()
        trained = f", {format_count(count)} of them trained" if count < engine.model.num_parameters() else ""
        return "; ".join(
            [
                f"{config.model.path or config.model.name} with {format_count(engine.model.num_parameters())} parameters{trained} "
                f"({format_bytes(engine.memory_components()['weights'])}), {engine.device.type}, {config.train.precision}, "
                f"{engine.world_size} x {torch.get_num_threads()} threads",
                f"global batch {config.train.global_batch_size} x {config.data.seq_len} tokens in micro-batches of "
                f"{engine.micro_batch_size}",
                *engine.describe(),
            ]
        )
