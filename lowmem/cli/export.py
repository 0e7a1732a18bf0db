"""The `export` command: a trained model as a directory that transformers loads."""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowmem.cli.options import OptionParser
from lowmem.system.errors import ConfigError
from lowmem.system.units import format_bytes

if TYPE_CHECKING:
    from lowmem.engine.run_model import RunModel
    from lowmem.engine.storage.blocks import Storage

FORMATS = ("hf", "adapter")
DTYPES = ("fp32", "bf16", "fp16")


def export_main(argv: Sequence[str]) -> int:
    """Run `lowmem export`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        LowmemError: every failure that a user can cause; the caller prints it and exits with its code.
    """
    parser = OptionParser("lowmem export", "Write a trained model as a directory that transformers loads.")
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory, or an adapter of PEFT that is to be merged")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--format", default="hf", help="hf: a directory of transformers, with an adapter merged in; adapter: the adapter alone, for PEFT"
    )
    parser.add_argument("--checkpoint", default="latest", help="latest, best, or a step")
    parser.add_argument(
        "--storage_dir", default="", metavar="DIR",
        help="keep blocks in a scratch file there while they are read; without it beside --out, if memory is too small for the model",
    )  # fmt: skip
    parser.add_argument("--dtype", default="", help=f"of the weights: {', '.join(DTYPES)}; default: as they are stored")
    parser.add_argument("--keep_factors", action="store_true", help="leave low-rank layers as they are; carries a model file")
    parser.add_argument("--overwrite", action="store_true", help="take a folder that is not empty; an earlier export there is replaced")
    flags = parser.parse_args(list(argv))
    if flags.format not in FORMATS:
        raise ConfigError(f"--format is {flags.format}, allowed: {', '.join(FORMATS)}")
    if flags.dtype and flags.dtype not in DTYPES:
        raise ConfigError(f"--dtype is {flags.dtype}, allowed: {', '.join(DTYPES)}")
    if not flags.checkpoint.isdigit() and flags.checkpoint not in ("latest", "best"):
        raise ConfigError(f"--checkpoint is {flags.checkpoint}, allowed: latest, best, or a step")
    from lowmem.engine.run_model import load_run_model

    which = flags.run, int(flags.checkpoint) if flags.checkpoint.isdigit() else flags.checkpoint
    outline = load_run_model(*which, outline=True)
    if outline.config.model.path:
        with _storage(outline, flags) as storage:
            return _export_of_transformers(load_run_model(*which, storage=storage), flags, storage)
    if flags.storage_dir:
        raise ConfigError(f"--storage_dir is given, but {flags.run} is a model of lowmem's own, which is exported in memory; leave it out")
    run = load_run_model(*which)
    if flags.format == "adapter":
        raise ConfigError(f"--format is adapter, but {flags.run} is a model of lowmem's own, which has none; use --format=hf")
    from lowmem.export.hf import export_run_model

    done = export_run_model(
        run, Path(flags.out), dtype=flags.dtype or None, keep_factors=flags.keep_factors, overwrite=flags.overwrite, run_dir=Path(flags.run)
    )
    kind = {"llama": "a plain Llama directory", "gpt2": "a plain GPT-2 directory"}.get(done.family)
    kind = kind or f"a directory that carries its model file, because {done.reason}"
    print(f"{flags.out}: {kind}; {done.parameters:,} parameters, {format_bytes(done.weight_bytes)}")
    if done.tokenizer_code and not done.model_code:
        print("its tokenizer is lowmem's own and is carried as code, which transformers runs only with trust_remote_code=True")
    trust = ", trust_remote_code=True" if done.model_code or done.tokenizer_code else ""
    print(f'from transformers import pipeline; pipeline("text-generation", model="{flags.out}"{trust})("Once")')
    return 0


def _storage(outline: "RunModel", flags: argparse.Namespace) -> "AbstractContextManager[Storage]":
    """A scratch file for the blocks of a model that is larger than the memory that is free, or if --storage_dir asks for one."""
    import torch

    from lowmem.engine.from_config import temporary_storage
    from lowmem.planning.generation_memory import weights_memory
    from lowmem.planning.hardware import this_hardware

    needed, free = weights_memory(outline.model, "device")[1], this_hardware().ram_bytes
    folder = Path(flags.storage_dir or flags.out)
    if needed > free:
        sizes = f"reading the weights takes {format_bytes(needed)} of RAM, {format_bytes(free)} are free"
        print(f"{sizes}: blocks are kept in a scratch file in {folder if flags.storage_dir else folder.parent}", file=sys.stderr)
    place: Literal["disk", "device"] = "disk" if flags.storage_dir or needed > free else "device"
    return temporary_storage(place, folder if flags.storage_dir else folder.parent, torch.device("cpu"))


def _export_of_transformers(run: "RunModel", flags: argparse.Namespace, storage: "Storage") -> int:
    if flags.keep_factors:
        raise ConfigError(
            f"--keep_factors is given, but {flags.run} is a model of transformers, which is written with whole weights; leave it out"
        )
    if flags.format == "adapter" and flags.dtype:
        raise ConfigError("--dtype is given with --format=adapter, which is written as it was trained; leave it out")
    from lowmem.export.adapters import adapter_note, export_of_transformers
    from lowmem.nn.lorptize import following_layers
    from lowmem.system.tensors import tensor_shapes, weight_files

    adapter, out = flags.format == "adapter", Path(flags.out)
    base, size = export_of_transformers(run, out, adapter=adapter, dtype=flags.dtype or None, overwrite=flags.overwrite, storage=storage)
    if adapter:
        print(f"{out}: an adapter of PEFT for {base}; {format_bytes(size)}")
        if note := adapter_note(run.model):
            print(note)
        print(f'from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained("{out}")')
    else:
        family = getattr(run.model, "family", "")
        parameters = sum(math.prod(shape) for file in weight_files(out) for shape in tensor_shapes(file).values())
        factors = ", low-rank factors multiplied out" if any(following_layers(run.model, {})) else ""
        print(f"{out}: a {family} directory of transformers{factors}; {parameters:,} parameters, {format_bytes(size)}")
        print(f'from transformers import pipeline; pipeline("text-generation", model="{out}")("Once")')
    print(f"lowmem generate --run {out} --prompt Once")
    return 0
