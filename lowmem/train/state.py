"""What the loop must remember to go on exactly where it was, besides weights and optimizer states."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lowmem.errors import CheckpointError

FORMAT_VERSION = 1
# checkpoints from before these existed lack them
_NEWER = {"rank", "flat_evaluations", "phase", "phase_start", "phase_ends", "data_ended", "tokenizer_sha256"}
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
