"""The `export` command: a trained model as a directory that transformers loads."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.cli.options import OptionParser
from lowmem.system.errors import ConfigError
from lowmem.system.units import format_bytes

if TYPE_CHECKING:
    from lowmem.engine.run_model import RunModel

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

    run = load_run_model(flags.run, int(flags.checkpoint) if flags.checkpoint.isdigit() else flags.checkpoint)
    if run.config.model.path:
        return _export_of_transformers(run, flags)
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


def _export_of_transformers(run: "RunModel", flags: argparse.Namespace) -> int:
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
    base, size = export_of_transformers(run, out, adapter=adapter, dtype=flags.dtype or None, overwrite=flags.overwrite)
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
