"""Every key of the configuration: its type and docstring, read off the dataclasses, and what it may hold.

One table of ranges is the source of checks, --help and docs/configuration.md. Imports no torch.
"""

import copy
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path

from lowmem.config.schema import (
    AdapterConfig,
    BudgetConfig,
    DataConfig,
    DistillConfig,
    EngineConfig,
    LorptConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from lowmem.system.units import parse_bytes, parse_count


def known_keys(cls: typing.Any = RunConfig) -> dict[str, type]:
    """Dotted key -> type; sections map to their dataclass. What is inside a list is no key of its own."""
    return _known_keys(cls)


@cache
def _known_keys(cls: typing.Any) -> dict[str, type]:
    known: dict[str, type] = {}
    for name, kind in hints(cls).items():
        known[name] = kind
        if is_dataclass(kind):
            known |= {f"{name}.{key}": inner for key, inner in known_keys(kind).items()}
    return known


def hints(cls: typing.Any) -> dict[str, typing.Any]:
    """The fields of a section with their types."""
    return _hints(cls)


@cache
def _hints(cls: typing.Any) -> dict[str, typing.Any]:
    return typing.get_type_hints(cls)


def item_class(kind: typing.Any) -> typing.Any:
    """The dataclass of which `kind` is a list, or None."""
    inside = typing.get_args(kind)
    return inside[0] if typing.get_origin(kind) is list and is_dataclass(inside[0]) else None


@cache
def field_docs(cls: typing.Any = RunConfig) -> dict[str, str]:
    """The docstring of every field by dotted key, such as "model.dim"."""
    known = known_keys(cls)
    sections = {"": cls, **known}
    return {key: docs_of(sections[key.rpartition(".")[0]])[key.rpartition(".")[2]] for key in known}


def docs_of(cls: typing.Any) -> dict[str, str]:
    """The docstrings of the fields of a section, and the ranges of those that are numbers."""
    return _docs_of(cls)


@cache
def _docs_of(cls: typing.Any) -> dict[str, str]:
    from docstring_parser import parse_from_object  # the docstring reader that jsonargparse uses

    parsed = {item.arg_name: " ".join((item.description or "").split()) for item in parse_from_object(cls).params}
    return {item.name: parsed.get(item.name, "") + _allowed(cls, item.name) for item in fields(cls)}


def _allowed(cls: typing.Any, name: str) -> str:
    return f" Allowed: {found}." if (found := allowed(cls, name)) else ""


_MOST_STEPS = 10**12
_MOST_SEQUENCES = 2**20
_MOST_LENGTH = 2**24
_MOST_WIDTH = 2**20
_NAME_BYTES, _PATH_BYTES = 255, 4095  # of a file's name and of a path, on Linux
MAX_ENTRIES = 1000  # sources and phases


@dataclass(frozen=True)
class Range:
    """Numbers that a key takes.

    Attributes:
        low, high: bounds; they belong to the range unless `open_low`, `open_high`.
        also: a value outside the bounds that has a meaning of its own.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    also: int | None = None

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or value == self.also

    def nearest(self, value: typing.Any) -> typing.Any:
        """A number of the range: `value`, or where it is outside one near it; text as it is."""
        if isinstance(value, str) or value in self:
            return value
        low, high = (
            0.5 * (self.low + self.high) if is_open else bound
            for is_open, bound in ((self.open_low, self.low), (self.open_high, self.high))
        )
        return type(self.low)(high if value > self.high else low) if isinstance(value, int) else float(high if value > self.high else low)

    def __str__(self) -> str:
        """ "at least 1, at most 1024", "in [0, 1)" or "0, or at least 1e-12, at most 1"."""
        low, high = _number(self.low), _number(self.high)
        if self.open_high:
            text = f"in {'(' if self.open_low else '['}{low}, {high})"
        else:
            text = f"{'above' if self.open_low else 'at least'} {low}, at most {high}"
        return text if self.also is None else f"{self.also}, or {text}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


_SEED = Range(0, 2**63 - 1)
_STEPS = Range(0, _MOST_STEPS)
_COUNT = Range(0, 2**31 - 1)
_LENGTH = Range(1, _MOST_LENGTH)
_SEQUENCES = Range(1, _MOST_SEQUENCES)
_SHARE = Range(0, 1, open_high=True)
_FACTOR = Range(0.0, 1e6)
_RANK = Range(0, _MOST_WIDTH)
_TOKENS = Range(0, 10**18)

# Of a map: the ranges of its keys, None for text, and of its values. Of a list: that of each entry.
RANGES: dict[type, dict[str, Range | tuple[Range | None, Range]]] = {
    SourceConfig: {
        "weight": Range(0.0, 1e6, open_low=True),
        "weight_schedule": (_STEPS, _FACTOR),
        "max_bytes": Range(0, 2**63 - 1),
    },
    DataConfig: {
        "tokenizer_vocab_size": Range(2, 2**24),
        "seq_len": _LENGTH,
        "val_fraction": _SHARE,
    },
    PhaseConfig: {"steps": _STEPS, "tokens": _TOKENS, "lr": Range(0.0, 1e30), "warmup_steps": Range(-1, _MOST_STEPS)},
    LorptConfig: {
        "rank": _RANK,
        "ranks": (None, _RANK),
        "schedule": (Range(1, _MOST_STEPS), Range(1, _MOST_WIDTH)),
        "grow_to": _RANK,
        "grow_patience": Range(1, 2**31 - 1),
    },
    ModelConfig: {
        "dim": Range(1, _MOST_WIDTH),
        "hidden_dim": Range(0, 2**24),
        "num_layers": Range(1, 4096),
        "num_heads": Range(1, 2**16),
        "num_kv_heads": Range(0, 2**16),
        "vocab_size": Range(0, 2**24),
        "max_seq_len": Range(0, _MOST_LENGTH),
        "rope_theta": Range(1.0, 1e12),
        "norm_eps": Range(1e-12, 1, also=0),
        "attention_rank": _RANK,
        "state_dim": Range(1, 2**16),
    },
    OptimConfig: {
        "lr": Range(0.0, 1e30),
        "matrix_lr": Range(0.0, 1e30),
        "momentum": _SHARE,
        "betas": _SHARE,
        "eps": Range(1e-30, 1),
        "weight_decay": Range(0, 1000),
        "clip": Range(0.0, 1e30),
        "warmup_steps": _STEPS,
        "min_lr_ratio": Range(0, 1),
        "decay_fraction": Range(0, 1, open_low=True),
    },
    DistillConfig: {"weight": Range(0, 1), "temperature": Range(0.001, 1000)},
    TrainConfig: {
        "steps": _STEPS,
        "tokens": _TOKENS,
        "global_batch_size": _SEQUENCES,
        "seq_len_schedule": (_STEPS, _LENGTH),
        "micro_batch_size": _SEQUENCES,
        "loss_chunk_tokens": _COUNT,
        "label_smoothing": _SHARE,
        "z_loss": Range(0, 1),
        "seed": _SEED,
        "save_every": _STEPS,
        "keep_last": Range(1, 2**31 - 1),
        "eval_every": _STEPS,
        "eval_sequences": _COUNT,
        "max_bad_steps": Range(1, 2**31 - 1),
        "threads": Range(0, 1024),
    },
    AdapterConfig: {
        "r": Range(1, 2**16),
        "lora_alpha": Range(0.0, 1e6, open_low=True),
        "lora_dropout": _SHARE,
        "loraplus_lr_ratio": Range(1.0, 1e6),
        "num_virtual_tokens": Range(1, 4096),
        "last_k": Range(1, 4096),
    },
}

# Keys of the fine-tuning command before it was the same program as `pretrain`, and what they are now.
RENAMED = {
    "base": "model.path", "base_dtype": "train.weight_dtype and train.precision", "template": "data.template",
    "method": "adapter.method (qlora: lora with train.weight_dtype=nf4; full: none)", "add_tokens": "data.add_tokens",
    "seq_len": "data.seq_len", "truncation": "data.truncation", "val_fraction": "data.val_fraction", "steps": "train.steps",
    "batch_size": "train.global_batch_size", "micro_batch_size": "train.micro_batch_size", "update": "train.update",
    "gradient_checkpointing": "train.activation_checkpointing", "eval_every": "train.eval_every", "save_every": "train.save_every",
    "seed": "train.seed", "out": "run_dir", "adapter.double_quant": "train.double_quant",
}  # fmt: skip

# DeepSpeed 0.19.8 adds a gradient to its group at the gradient's offset and reads it there past the page cache, which the kernel refuses
# where that is no multiple of 512 bytes; DeepSpeed does not look whether it was read, and updates with what the buffer held before.
NVME_REFUSAL = (
    "DeepSpeed's NVMe offload trains wrongly, without an error, where a gradient's offset is no multiple of 512 bytes, and its files are "
    "not in lowmem's checkpoints; use cpu, or on one process engine.name=local with train.update=layerwise and train.weights_at=disk"
)

# Values that a key does not take though other programs have them there: why not, and what to use.
REFUSED_VALUES = {"engine.offload": {"nvme": NVME_REFUSAL}}

# Keys that name a file or a folder: ~ is expanded in them.
PATHS: dict[type, tuple[str, ...]] = {
    SourceConfig: ("path",),
    DataConfig: ("tokenizer", "val_source", "cache_dir", "template"),
    ModelConfig: ("path",),
    PhaseConfig: ("template",),
    DistillConfig: ("teacher",),
    TrainConfig: ("init_from",),
    EngineConfig: ("config",),
    RunConfig: ("run_dir",),
}


def allowed(cls: type, name: str) -> str:
    """The range of a key for people; "" for one that takes no numbers."""
    found = RANGES.get(cls, {}).get(name)
    if isinstance(found, tuple):
        keys, values = found
        return f"keys {keys}; values {values}" if keys else f"values {values}"
    return str(found or "")


def value_problems(config: typing.Any) -> dict[str, list[str]]:
    """Numbers out of range and texts that no file or file name can hold: one line each, by the dotted key."""
    found = {key.dotted: list(_problems(key)) for key in _keys(config)}
    return {dotted: problems for dotted, problems in found.items() if problems}


def bounded(config: typing.Any, wrong: typing.Collection[str]) -> typing.Any:
    """A copy in which the numbers of the keys `wrong` are the nearest that are allowed: contradictions can be looked for in it."""
    config = copy.deepcopy(config)
    for key in _keys(config):
        found = RANGES.get(type(key.section), {}).get(key.name)
        if key.dotted in wrong and isinstance(found, Range):
            value = type(key.value)(found.nearest(item) for item in key.value) if isinstance(key.value, tuple) else found.nearest(key.value)
            setattr(key.section, key.name, value)
        elif key.dotted in wrong and (isinstance(found, tuple) or isinstance(key.section, BudgetConfig)):
            setattr(key.section, key.name, type(key.value)())
    return config


def expand_home(config: typing.Any) -> list[str]:
    """Replace ~ by the home directory in every key that names a file or a folder, in place; what could not be replaced, one line each."""
    problems = []
    for key in _keys(config):
        text = key.value
        if key.name in PATHS.get(type(key.section), ()) and (text == "~" or text.startswith("~/")):
            try:
                setattr(key.section, key.name, str(Path(text).expanduser()) + ("/" if text.endswith("/") else ""))
            except RuntimeError:
                problems.append(f"{key.dotted} is {text}, but this user has no home directory; write the whole path")
    return problems


@dataclass(frozen=True)
class _Key:
    """A value that is no section, and where it stands."""

    section: typing.Any
    name: str
    dotted: str
    value: typing.Any


def _keys(section: typing.Any, prefix: str = "") -> Iterator[_Key]:
    for item in fields(section):
        value, dotted = getattr(section, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from _keys(value, f"{dotted}.")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for index, entry in enumerate(value):
                yield from _keys(entry, f"{dotted}[{index}].")
        else:
            yield _Key(section, item.name, dotted, value)


def _problems(key: _Key) -> Iterator[str]:
    cls, value = type(key.section), key.value
    for text in _texts(value):
        if problem := _text_problem(text, key.name in PATHS.get(cls, ())):
            yield f"{key.dotted} is {shown(text)}, {problem}"
    if cls is BudgetConfig and value:
        yield from _size_problems(key)
    found = RANGES.get(cls, {}).get(key.name)
    if isinstance(found, tuple):
        for entry, number in value.items():
            if (found[0] is not None and entry not in found[0]) or (not isinstance(number, str) and number not in found[1]):
                yield f"{key.dotted} has {shown(entry, quotes=False)}: {shown(number)}; allowed: {allowed(cls, key.name)}"
    elif found and isinstance(value, (list, tuple)):
        yield from (f"{key.dotted} has {shown(entry)}, must be {found}" for entry in value if entry not in found)
    elif found:
        number = _count(value) if key.name == "tokens" else value
        if not isinstance(number, str) and number not in found:
            yield f"{key.dotted} is {shown(value)}, must be {found}"


def _size_problems(key: _Key) -> Iterator[str]:
    try:
        size = parse_bytes(key.value)
    except ValueError as error:
        yield f"{key.dotted}: {error}"
        return
    if key.name == "ram" and not size:
        yield f"{key.dotted} is {key.value}, but nothing runs in no memory; leave it out for no limit"


def _count(value: typing.Any) -> typing.Any:
    """Of tokens; text that is no count is looked at with what it contradicts."""
    try:
        return parse_count(value)
    except ValueError:
        return value


def _texts(value: typing.Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for text in pair if isinstance(text, str))
    elif isinstance(value, (list, tuple)):
        yield from (text for text in value if isinstance(text, str))


def _text_problem(text: str, is_path: bool) -> str:
    """What is wrong with a text, "" if nothing is."""
    if "\0" in text:
        return "which has a NUL character; remove it"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "which is no UTF-8 text; write it in UTF-8"
    if is_path and (size > _PATH_BYTES or max(len(part.encode()) for part in text.split("/")) > _NAME_BYTES):
        return f"longer than a path may be: {_NAME_BYTES} bytes a name, {_PATH_BYTES} together"
    return ""


def shown(value: typing.Any, *, quotes: bool = True, most: int = 80) -> str:
    """A value as a message shows it: as YAML writes it, and at most `most` characters of it."""
    text = {None: "null", True: "true", False: "false"}.get(value, "") if value is None or isinstance(value, bool) else ""
    text = text or (repr(value) if quotes or not isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[: most * 3 // 4]}... ({len(text)} characters)"
