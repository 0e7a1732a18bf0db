"""The `plan` command: the fastest settings that fit a memory budget, or the largest model that does."""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.cli.options import OptionParser, dotted_overrides
from lowmem.config.dump import dump_config
from lowmem.config.load import load_run_config
from lowmem.config.schema import ModelConfig, RunConfig
from lowmem.system.dry_run import on_meta
from lowmem.system.errors import MemoryBudgetError, StorageError
from lowmem.system.files import replace_file
from lowmem.system.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from lowmem.planning.generation_memory import GenerationMemory
    from lowmem.planning.hardware import Hardware
    from lowmem.planning.predict import Prediction


_CHOSEN = (
    "train.micro_batch_size", "train.activation_checkpointing", "train.update", "optim.state_bits", "train.weight_dtype",
    "train.precision", "train.weights_at",
)  # fmt: skip
_BY_BLOCKS = "--train.weights_at=disk --train.boundary_offload=disk --train.update=layerwise --train.activation_checkpointing=block"
_PROCESS_BYTES = 250_000_000  # of any process that has imported PyTorch
# For those who name no model: the largest of these that fits. Width, MLP width, layers, heads, vocabulary, sequence.
_SHAPES_ON_DISK = {
    "6.7B": (4096, 11008, 32, 32, 32000, 512),
    "3.4B": (3200, 8640, 26, 32, 32000, 512),
    "1.1B": (2048, 5632, 22, 16, 32000, 512),
    "537M": (1536, 4096, 16, 16, 32000, 512),
}  # tried where a budget of disk is given
_SHAPES = {
    "215M": (1024, 2688, 12, 16, 32000, 512),
    "58M": (512, 1408, 8, 8, 32000, 512),
    "13M": (384, 1024, 4, 6, 8192, 256),
    "4M": (256, 704, 4, 4, 4096, 128),
}


def plan_main(argv: Sequence[str]) -> int:
    """Run `lowmem plan`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        MemoryBudgetError: nothing fits; the message has what is missing and the nearest plans.
        LowmemError: every other failure that a user can cause.
    """
    flags, rest = _parse(argv)
    overrides = dotted_overrides(rest, "lowmem plan")
    if not flags.config and not any(override.startswith(("train.steps=", "train.tokens=")) for override in overrides):
        overrides.insert(0, "train.tokens=100M")
    config = load_run_config(flags.config, overrides)
    if flags.write:
        _check_target(Path(flags.write))
    with _set_budget(config, flags.hardware):
        return _solve(config, flags) if flags.solve else _plan(config, flags)


def _plan(config: RunConfig, flags: argparse.Namespace) -> int:
    found = _planned(config, flags.config)
    if flags.json:
        print(json.dumps(_as_json(found), indent=1))
    if not found.fits:
        raise MemoryBudgetError(_nothing_fits(found))
    if not flags.json:
        print("\n".join(_table([found.prediction, *found.alternatives])))
        print(f"afterwards, {_writing(found.prediction.config)}")
    if flags.write:
        _write(flags.write, found.prediction)
    return 0


def _writing(config: RunConfig) -> "GenerationMemory":
    """What `lowmem generate` will need for one text as long as the sequences of training."""

    from lowmem.engine.from_config import build_configured_model
    from lowmem.generation import PREFILL_TOKENS
    from lowmem.planning.generation_memory import generation_memory

    with on_meta():
        model = build_configured_model(config).eval()
    return generation_memory(model, 1, config.model.max_seq_len, PREFILL_TOKENS, config.device)


def _planned(config: RunConfig, path: str) -> Any:
    """The plan for the model that was given, or for the largest of a few that fits."""
    from lowmem.planning.search import plan

    if path or config.model != ModelConfig():
        return plan(config)
    shapes = {**(_SHAPES_ON_DISK if parse_bytes(config.budget.disk or "0") else {}), **_SHAPES}
    for name, (dim, hidden_dim, layers, heads, vocab_size, seq_len) in shapes.items():
        shaped = copy.deepcopy(config)
        shaped.model = ModelConfig(dim=dim, hidden_dim=hidden_dim, num_layers=layers, num_heads=heads)
        shaped.data.tokenizer_vocab_size, shaped.data.seq_len = vocab_size, seq_len
        if name != "4M" and _hopeless(shaped):
            continue
        found = plan(shaped)
        if found.fits:
            print(f"no model was given: planning for a {name} decoder; name yours with --config or --model.dim=...", file=sys.stderr)
            break
    return found


def _hopeless(config: RunConfig) -> bool:
    """Whether even narrow weights and states, with nothing else, exceed a budget."""

    from lowmem.models.registry import build_model
    from lowmem.planning.disk_space import checkpoints_at_once

    with on_meta():
        model = build_model(config.model, vocab_size=config.data.tokenizer_vocab_size, max_seq_len=config.data.seq_len, seed=0)
    numbers, disk = model.num_parameters(), parse_bytes(config.budget.disk or "0")
    blocks = matrices = 0
    if disk:  # neither need be in memory, but matrices with a row for each word are, with one byte a number or more, until all are there
        blocks, head = sum(parameter.numel() for parameter in model.blocks.parameters()), model.dense_head()
        beside = [model.lookup_parameter(), None if head is None else head.weight]
        matrices = sum({id(weight): weight.numel() for weight in beside if weight is not None}.values())
    limits = [parse_bytes(limit) for limit in (config.budget.vram, config.budget.ram) if limit and parse_bytes(limit)]
    memory = 3 * (numbers - blocks - matrices) + matrices + _PROCESS_BYTES > min(limits, default=1 << 60)
    return memory or (disk > 0 and 3 * numbers * (1 + checkpoints_at_once(config)) > disk)


def _solve(config: RunConfig, flags: argparse.Namespace) -> int:
    from lowmem.planning.search import solve

    solution = solve(config, flags.solve)
    answer = {"key": solution.key, "value": solution.value, "next": solution.beyond, **solution.prediction.report()}
    if flags.json:
        print(json.dumps(answer, indent=1))
    if not solution.value:
        raise MemoryBudgetError(
            f"not even {solution.key}={solution.beyond} fits: {_needs(solution.prediction)}; other settings: lowmem plan"
        )
    if not flags.json:
        print(f"{solution.key}={solution.value} is the largest that fits: {_needs(solution.prediction)}")
        print(f"{solution.beyond} does not" if solution.beyond else "no larger value is allowed")
        if config.train.weights_at == "device" and config.budget.disk and parse_bytes(config.budget.disk):
            print(f"with blocks on a disk there may be more: --solve={flags.solve} {_BY_BLOCKS}", file=sys.stderr)
    if flags.write:
        _write(flags.write, solution.prediction)
    return 0


def _set_budget(config: RunConfig, hardware_name: str) -> AbstractContextManager[None]:
    """The budget that was given, or what the named or this hardware has; in the context that is returned rates are the named one's."""
    from lowmem.planning.hardware import describe, named_hardware, planning_for, this_hardware

    if hardware_name:
        hardware = named_hardware(hardware_name)
    elif config.budget.ram or config.budget.vram:
        _use_device(config, parse_bytes(config.budget.vram or "0") > 0)
        return nullcontext()
    else:
        hardware = this_hardware()
    config.budget.ram = config.budget.ram or _mib(hardware.ram_bytes)
    config.budget.vram = config.budget.vram or (_mib(hardware.vram_bytes) if hardware.vram_bytes else "0")
    config.budget.disk = config.budget.disk or (_mib(hardware.disk_bytes) if hardware.disk_bytes else "")
    ram, vram, disk = (parse_bytes(size or "0") for size in (config.budget.ram, config.budget.vram, config.budget.disk))
    print(f"planning for {describe(replace(hardware, ram_bytes=ram, vram_bytes=vram, disk_bytes=disk))}", file=sys.stderr)
    _use_device(config, hardware.vram_bytes > 0)
    _use_precision(config, hardware)
    return planning_for(hardware)


def _use_device(config: RunConfig, gpu: bool) -> None:
    if config.device == "auto":
        config.device = "cuda" if gpu else "cpu"


def _use_precision(config: RunConfig, hardware: "Hardware") -> None:
    if config.device == "cuda" and config.train.precision == "auto" and not hardware.bf16:
        config.train.precision = "fp16"


def _mib(size: int) -> str:
    return f"{size >> 20}MiB"


def _as_json(found: Any) -> dict[str, Any]:
    return {
        "fits": found.fits,
        "missing_bytes": found.missing,
        "plan": found.prediction.report(),
        "alternatives": [other.report() for other in found.alternatives],
    }


def _settings(prediction: "Prediction") -> str:
    from lowmem.planning.levers import get_key

    return " ".join(f"{key.split('.')[1]}={get_key(prediction.config, key)}" for key in _CHOSEN)


def _table(predictions: "Sequence[Prediction]") -> list[str]:
    lines = [f"{'plan':8} {'RAM':>10} {'VRAM':>10} {'disk':>10} {'tokens/s':>9}  settings"]
    for number, prediction in enumerate(predictions):
        ram, vram = format_bytes(prediction.host.peak_bytes), format_bytes(prediction.cuda_reserved.peak_bytes)
        name, disk = "fastest" if not number else f"other {number}", format_bytes(prediction.disk_bytes)
        speed = f"{prediction.tokens_per_s:,.{0 if prediction.tokens_per_s >= 10 else 2}f}"
        lines.append(f"{name:8} {ram:>10} {vram:>10} {disk:>10} {speed:>9}  {_settings(prediction)}")
    return [f"{predictions[0].parameters:,} parameters", *lines, *predictions[0].lines()[1:]]


def _needs(prediction: "Prediction") -> str:
    ram, vram, disk = prediction.host.peak_bytes, prediction.cuda_reserved.peak_bytes, prediction.disk_bytes
    parts = [f"{format_bytes(ram)} of RAM", *([f"{format_bytes(vram)} of VRAM"] if vram else []), f"{format_bytes(disk)} of disk"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _nothing_fits(found: Any) -> str:
    budget = found.prediction.config.budget
    lacks = [f"{format_bytes(size)} of {_name(kind)} (budget {getattr(budget, kind)})" for kind, size in found.missing.items()]
    nearest = "\n".join(f"  {_needs(other)}: {_settings(other)}" for other in [found.prediction, *found.alternatives])
    parts = "\n".join(f"  {line}" for line in found.prediction.lines()[1:])
    return (
        f"nothing fits: the smallest plan lacks {' and '.join(lacks)}, a margin included. It needs\n{parts}\n"
        f"The nearest plans:\n{nearest}\n"
        f"Use a larger budget{', fewer checkpoints (--train.keep_last=1)' if 'disk' in found.missing else ''}, or a smaller model: "
        "lowmem plan --solve=model.dim, model.num_layers or data.seq_len"
    )


def _name(budget: str) -> str:
    return budget if budget == "disk" else budget.upper()


def _check_target(path: Path) -> None:
    """Before a search that takes minutes: that the plan can be written."""
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise StorageError(f"--write={path} cannot be written ({why}); name a file in a folder that is there")


def _write(path: str, prediction: "Prediction") -> None:
    comments = "\n".join(f"# {line}" for line in ["Written by lowmem plan.", *prediction.lines()])
    try:
        replace_file(Path(path), f"{comments}\n\n{dump_config(prediction.config)}")
    except OSError as error:
        raise StorageError(f"--write={path} cannot be written ({error.strerror}); name a file in a folder that is there") from error


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="lowmem plan",
        description="The fastest settings that fit memory and disk. Any key of the configuration can be given as --section.key=value.",
    )
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file with the model and the data")
    parser.add_argument("--hardware", default="", metavar="NAME", help="plan for a device by its name, such as t4; default: this machine")
    parser.add_argument("--solve", default="", metavar="KEY", help="the largest model.dim, model.num_layers, data.seq_len, ... that fits")
    parser.add_argument("--write", default="", metavar="FILE", help="write the plan as a configuration that pretrain takes")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_known_args(list(argv))
