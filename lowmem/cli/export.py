"""The `export` command: a trained model as a directory that transformers loads."""

from collections.abc import Sequence
from pathlib import Path

from lowmem.cli.options import OptionParser
from lowmem.system.errors import ConfigError
from lowmem.system.units import format_bytes

FORMATS = ("hf",)
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
    parser.add_argument("--run", required=True, metavar="DIR", help="run directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--format", default="hf", help="hf: Hugging Face transformers")
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
    from lowmem.export.hf import export_run_model

    run = load_run_model(flags.run, int(flags.checkpoint) if flags.checkpoint.isdigit() else flags.checkpoint)
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
