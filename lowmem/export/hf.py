"""A lowmem model as a model of transformers, in memory or as a directory."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem.data.storage import UNFINISHED, write_json, written_whole
from lowmem.engine.tensor_file import all_finite, meta_tensors, write_tensors
from lowmem.errors import CheckpointError, ConfigError
from lowmem.export.carried import carried_config, carried_weights
from lowmem.export.plain import gpt2_config, gpt2_weights, llama_config, llama_weights, plain_family
from lowmem.export.tokenizer_files import GENERATION_CONFIG, TOKENIZER_FILES, export_tokenizer, read_generation_config
from lowmem.models.base import LanguageModel
from lowmem.nn.lorptize import merge_lorpt
from lowmem.run_model import RunModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CODE = [Path(__file__).parent / name for name in ("configuration_lowmem.py", "modeling_lowmem.py")]
_AUTO = {"AutoConfig": "configuration_lowmem.LowmemConfig", "AutoModelForCausalLM": "modeling_lowmem.LowmemForCausalLM"}
_FILES = (
    "config.json", "generation_config.json", "model.safetensors", *(path.name for path in _CODE), *TOKENIZER_FILES,
)  # fmt: skip
_PLAIN: dict[str, tuple[Any, Any, str]] = {
    "llama": (llama_config, llama_weights, "LlamaForCausalLM"),
    "gpt2": (gpt2_config, gpt2_weights, "GPT2LMHeadModel"),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        family: llama, gpt2, or lowmem for a directory that carries its model file.
        reason: why it is no plain family.
        model_code, tokenizer_code: whether transformers asks for trust_remote_code, and for what.
        parameters: numbers in the weights.
        weight_bytes: size of model.safetensors.
    """

    family: Literal["llama", "gpt2", "lowmem"]
    reason: str
    model_code: bool
    tokenizer_code: bool
    parameters: int
    weight_bytes: int


@torch.no_grad()
def converted(model: LanguageModel, *, keep_factors: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor], str, str]:
    """Configuration and weights for transformers.

    Args:
        model: its low-rank layers are merged in place where that makes it a plain family.
        keep_factors: leave low-rank layers as they are.
    Returns:
        config.json without tokens and dtype, weights by name, the family, and why it is not a plain one.
    Memory: low-rank layers, multiplied out.
    """
    family, reason = ("", "its factors are kept") if keep_factors else plain_family(model)
    if not family:
        config = {"model_type": "lowmem", "architectures": ["LowmemForCausalLM"], "auto_map": _AUTO, **carried_config(model)}
        return config, dict(carried_weights(model)), "lowmem", reason
    merge_lorpt(model)
    make_config, weights, architecture = _PLAIN[family]
    return {"model_type": family, "architectures": [architecture], **make_config(model)}, dict(weights(model)), family, ""


def export_run_model(
    run: RunModel,
    out: Path | str,
    *,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    keep_factors: bool = False,
    overwrite: bool = False,
    run_dir: Path | None = None,
) -> Exported:
    """Write the directory that `transformers.pipeline("text-generation", model=out)` runs.

    Args:
        run: its model is changed: see `converted`.
        dtype: of the weights; None takes that of the checkpoint's, and fp32 for quantised ones.
        overwrite: take a folder that is not empty: an earlier export there is replaced, and other files are left alone.
        run_dir: where the run's chat template is; None takes that of the checkpoint.
    Raises:
        ConfigError: `out` is not empty, or no folder.
        CheckpointError: weights are not finite, or not in `dtype`.
        StorageError: it cannot be written.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out is {out}, which is a file; choose a folder")
    if out.is_dir() and not overwrite and any(not path.name.startswith(UNFINISHED) for path in out.iterdir()):
        raise ConfigError(f"--out is {out}, which is not empty; choose another folder, or --overwrite")
    config, weights, family, reason = converted(run.model, keep_factors=keep_factors)
    stored = DTYPES[dtype] if dtype else _stored_dtype(run)
    weights = {name: tensor.to(stored) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if not all_finite(tensor):
            raise CheckpointError(
                f"{run.path} holds weights that are not finite in {stored} ({name}); choose another --checkpoint, or --dtype=fp32"
            )
    tokens = {"eos_token_id": run.tokenizer.eos_id, "pad_token_id": run.tokenizer.eos_id}
    template = run_dir or run.path.parent.parent
    generation = read_generation_config(template)  # of an imported run
    with written_whole(out, earlier=_FILES) as folder:  # what an earlier export wrote and this one does not is gone then
        tokenizer_code = export_tokenizer(run.tokenizer, folder, run_dir=template, max_seq_len=run.model.max_seq_len)
        write_json(folder / "config.json", {**config, **tokens, "bos_token_id": None, "dtype": str(stored).removeprefix("torch.")})
        write_json(folder / GENERATION_CONFIG, {**tokens, "use_cache": True, **generation})
        if family == "lowmem":
            for code in _CODE:
                shutil.copyfile(code, folder / code.name)
        write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    numbers = sum(tensor.numel() for tensor in weights.values())
    size = (out / "model.safetensors").stat().st_size
    return Exported(family, reason, family == "lowmem", tokenizer_code, numbers, size)  # type: ignore[arg-type]


def _stored_dtype(run: RunModel) -> torch.dtype:
    """What the checkpoint holds, which on a device without bf16 is not what was loaded."""
    path = run.path / "model.safetensors"
    if not path.is_file():
        return DTYPES.get(run.config.train.weight_dtype, torch.float32)
    found = {tensor.dtype for _, tensor in meta_tensors(path)}
    return found.pop() if len(found) == 1 else torch.float32


def hf_model(run: RunModel, *, keep_factors: bool = False) -> Any:
    """The model as a transformers.PreTrainedModel in memory, which shares its weights where it can.

    Args:
        run: its model is changed: see `converted`.
    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("this needs transformers; pip install 'lowmem[hf]'") from error
    config, weights, family, _ = converted(run.model, keep_factors=keep_factors)
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    values |= {"eos_token_id": run.tokenizer.eos_id, "pad_token_id": run.tokenizer.eos_id, "bos_token_id": None}
    with torch.device("meta"):
        if family == "lowmem":
            from lowmem.export.modeling_lowmem import LowmemConfig, LowmemForCausalLM

            LowmemConfig.register_for_auto_class()  # save_pretrained then writes the model file beside the weights
            LowmemForCausalLM.register_for_auto_class("AutoModelForCausalLM")
            model: Any = LowmemForCausalLM(LowmemConfig(**values))
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    return fill(model, weights)


def fill(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """Give a model on the meta device its weights; buffers are computed anew."""
    config = model.config
    model.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, strict=False, assign=True)
    model.tie_weights()
    with torch.device("cpu"):
        buffers = {name for name, buffer in model.named_buffers() if buffer.is_meta}
        for owner in {name.rpartition(".")[0] for name in buffers}:
            module = model.get_submodule(owner)
            fresh = type(module)(config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, missing
    return model.eval()
