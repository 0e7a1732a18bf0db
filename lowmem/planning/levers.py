"""What may be changed to need less memory, and why a run does not fit its budget, naming the change that saves most."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lowmem.config.checks import config_problems
from lowmem.config.schema import RunConfig, auto_micro_batch_sizes
from lowmem.planning.predict import Prediction, described, listed_bytes, predict_peak
from lowmem.system.units import format_bytes, parse_bytes

MARGIN = 0.03  # of a budget, for what a prediction misses; see profiling/README.md


@dataclass(frozen=True)
class Lever:
    """One change of a configuration.

    Attributes:
        text: as a user would type it.
        apply: makes it, in place.
    """

    text: str
    apply: Callable[[RunConfig], None]


def set_key(config: RunConfig, key: str, value: object) -> None:
    """Set a dotted key."""
    *sections, name = key.split(".")
    part = config
    for section in sections:
        part = getattr(part, section)
    setattr(part, name, value)


def get_key(config: RunConfig, key: str) -> object:
    """The value of a dotted key."""
    part: object = config
    for name in key.split("."):
        part = getattr(part, name)
    return part


def lever(**settings: object) -> Lever:
    """Several keys at once, with __ for the dots."""
    keys = {name.replace("__", "."): value for name, value in settings.items()}

    def apply(config: RunConfig) -> None:
        for key, value in keys.items():
            set_key(config, key, value)

    return Lever(" ".join(f"--{key}={value}" for key, value in keys.items()), apply)


def levers(config: RunConfig) -> list[Lever]:
    """What would take less memory than `config`, one change each; none that is in force or not possible."""
    layerwise = {"train__update": "layerwise", "train__activation_checkpointing": "block"}
    stored = "bf16" if config.train.precision == "fp8" else config.train.precision
    narrow = {"train__precision": config.train.precision, "train__weight_dtype": stored}
    candidates = [
        lever(train__micro_batch_size=1),
        lever(train__activation_checkpointing="block"),
        lever(**layerwise),
        lever(optim__state_bits=8, optim__backend="lowmem"),
        lever(optim__state_bits=4, optim__backend="lowmem"),
        lever(**narrow) if stored in ("bf16", "fp16") and config.train.weight_dtype == "fp32" else lever(),
        lever(train__loss_chunk_tokens=256),
        lever(engine__offload="cpu", engine__zero_stage=2) if config.engine.name == "deepspeed" else lever(),
    ]
    return [candidate for candidate in [*candidates, *streaming(config)] if _changes(config, candidate)]


_BY_BLOCKS = {"train__update": "layerwise", "train__activation_checkpointing": "block"}


def streaming(config: RunConfig) -> list[Lever]:
    """Places for blocks besides the device: a GPU's host memory, a disk. They cost time, where computing does not hide the transfer."""
    no_disk = bool(config.budget.disk) and not parse_bytes(config.budget.disk)
    found = []
    if config.device == "cuda" and config.train.weights_at == "device":
        found.append(lever(train__weights_at="host", train__boundary_offload="cpu", **_BY_BLOCKS))
    if not no_disk:
        found.append(lever(train__weights_at="disk", train__boundary_offload="disk", **_BY_BLOCKS))
    return found


def changed(config: RunConfig, *changes: Lever) -> RunConfig:
    """A copy with the changes made."""
    config = copy.deepcopy(config)
    for change in changes:
        change.apply(config)
    return config


def predict_fitting(config: RunConfig, world_size: int = 1, local_ranks: int = 0) -> Prediction:
    """The prediction of a run; where its micro-batch is left to lowmem, with the largest that fits the budget, or the smallest of all.

    Args:
        config, world_size, local_ranks: see `predict_peak`. Ranks of DeepSpeed keep the micro-batch that each of them finds by itself.
    """
    sizes: list[int | Literal["auto"]] = [config.train.micro_batch_size]
    if sizes == ["auto"] and world_size == 1 and (config.budget.ram or config.budget.vram):
        sizes = list(auto_micro_batch_sizes(config.train.global_batch_size, config.data.seq_len))
    for size in sizes:
        tried = replace(config, train=replace(config.train, micro_batch_size=size))
        prediction = predict_peak(tried, world_size, local_ranks)
        if not missing_bytes(prediction, margin=0.0):
            break
    return prediction


def missing_bytes(prediction: Prediction, margin: float = MARGIN) -> dict[str, int]:
    """Bytes beyond each budget that is exceeded, a margin of memory included; empty if the run fits."""
    budget, missing = prediction.config.budget, {}
    for name, need in needs(prediction).items():
        limit = parse_bytes(getattr(budget, name) or "0")
        allowed = limit * (1 - margin) if name != "disk" else limit  # of disks the prediction is exact
        if limit and need > allowed:
            missing[name] = round(need - allowed)
    return missing


def needs(prediction: Prediction) -> dict[str, int]:
    """Bytes by the budget that they are held against."""
    return {"ram": prediction.host.peak_bytes, "vram": prediction.cuda_reserved.peak_bytes, "disk": prediction.disk_bytes}


def _changes(config: RunConfig, candidate: Lever) -> bool:
    other = changed(config, candidate)
    return other != config and not config_problems(other)


def sizes(limit: int) -> Iterator[int]:
    """Divisors of `limit`, largest first."""
    return (size for size in range(limit, 0, -1) if limit % size == 0)


def refusal(prediction: Prediction, world_size: int = 1, local_ranks: int = 0, margin: float = 0.0) -> str:
    """Empty if the run fits.

    Args:
        world_size, local_ranks: see `predict_peak`.
        margin: share of the budget that is to stay free.
    """
    missing = missing_bytes(prediction, margin)
    if not missing:
        return ""
    budget, parts = prediction.config.budget, []
    whole = {"ram": described(prediction.host), "vram": described(prediction.cuda_reserved), "disk": listed_bytes(prediction.disk)}
    for name in missing:
        parts.append(f"{whole[name]} of {name if name == 'disk' else name.upper()}, the budget is {getattr(budget, name)}")
    which = next(iter(missing))
    saving = _largest_saving(prediction, world_size, local_ranks, which, missing[which])
    return f"the run needs {' and '.join(parts)}. {saving}See: lowmem plan"


def _largest_saving(prediction: Prediction, world_size: int, local_ranks: int, which: str, missing: int) -> str:
    """Of what is missing most; blocks elsewhere, which cost time, where no other change is enough by itself."""
    best, saved = None, 0
    elsewhere = {lever.text for lever in streaming(prediction.config)}
    for lever in _disk_savers(prediction.config) if which == "disk" else levers(prediction.config):
        if lever.text in elsewhere and saved >= missing:
            continue
        other = predict_peak(changed(prediction.config, lever), world_size, local_ranks, prediction.base)
        if lever.text in elsewhere and needs(other)["disk"] > (parse_bytes(prediction.config.budget.disk or "0") or float("inf")):
            continue
        saving = needs(prediction)[which] - needs(other)[which]
        if saving > saved:
            best, saved = lever, saving
    return f"Largest saving: {best.text} (-{format_bytes(saved)}). " if best else ""


def _disk_savers(config: RunConfig) -> list[Lever]:
    """What would take less room on disks."""
    candidates = [*levers(config), lever(train__keep_last=1)]
    candidates += [lever(train__weights_at="device", train__boundary_offload="none", train__storage_dir="")]
    candidates += [lever(train__boundary_offload="none")] if config.train.weights_at == "disk" else []
    candidates += [lever(train__boundary_dtype="bf16")] if config.train.boundary_offload == "disk" else []
    return [candidate for candidate in candidates if _changes(config, candidate)]
