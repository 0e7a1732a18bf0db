"""The `import` command: a Llama or GPT-2 directory of transformers as a run directory."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lowmem.cli.options import OptionParser, dotted_overrides
from lowmem.config.load import load_config
from lowmem.config.schema import LorptConfig
from lowmem.system.errors import ConfigError

LORPT_KEYS = ("rank", "targets", "ranks", "share_down")  # what a conversion of trained weights can follow


def import_main(argv: Sequence[str]) -> int:
    """Run `lowmem import`.

    Args:
        argv: without the program's name.
    Returns:
        0.
    Raises:
        LowmemError: every failure that a user can cause; the caller prints it and exits with its code.
    """
    parser = OptionParser("lowmem import", "Turn a Llama or GPT-2 directory of transformers into a run directory.")
    parser.add_argument("directory", metavar="DIR", help="with config.json, safetensors and tokenizer.json")
    parser.add_argument("--out", required=True, metavar="RUN", help="run directory to write, new or empty")
    parser.epilog = (
        f"--lorpt.{{{','.join(LORPT_KEYS)}}}=VALUE, as model.lorpt.* of a configuration: turn layers into LoRPt layers, the best "
        "approximation of their rank; --lorpt.rank=auto halves each layer"
    )
    flags, rest = parser.parse_known_args(list(argv))
    lorpt = _lorpt(dotted_overrides(rest, "lowmem import"))
    from lowmem.export.import_hf import import_directory

    done = import_directory(Path(flags.directory), Path(flags.out), lorpt)
    shape = done.config.model
    print(f"{flags.out}: a {done.family} model, {done.parameters:,} parameters, {shape.num_layers} layers of width {shape.dim}")
    if done.converted:
        kept = [layer.retained_energy or 0.0 for layer in done.converted]
        print(
            f"{len(kept)} layers are low-rank now and keep {min(kept):.1%} to {max(kept):.1%} of the sum of their squared singular values; "
            "the less, the more the model has to be trained on"
        )
    print(f"to write:           lowmem generate --run {flags.out}")
    print(f"to go on training:  lowmem pretrain --config {flags.out}/config.yaml --data.sources='[{{path: FILES}}]' --train.tokens=N")
    return 0


def _lorpt(overrides: list[str]) -> LorptConfig | None:
    """The conversion that is asked for; None if none is."""
    keys = [override.partition("=")[0].partition("lorpt.")[2] for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if not override.startswith("lorpt.") or key not in LORPT_KEYS:
            known = "which trained weights cannot follow" if key in {field.name for field in fields(LorptConfig)} else "which is unknown"
            name = override.partition("=")[0]
            raise ConfigError(f"--{name} is given, {known}; allowed: {', '.join(f'--lorpt.{name}' for name in LORPT_KEYS)}")
    if not overrides:
        return None
    return load_config(LorptConfig, "", [override.removeprefix("lorpt.") for override in overrides], lambda config: [])
